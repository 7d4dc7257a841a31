"""Bad text made of good text, so that quality has a measure: what was done is known, so is how much it harms."""

import random
from collections.abc import Callable

Corruption = Callable[[str, random.Random], str]

_CONFUSED = {
    "l": "1",
    "1": "l",
    "o": "0",
    "0": "o",
    "e": "c",
    "m": "rn",
    "h": "b",
    "S": "5",
    "B": "8",
    "i": "j",
}
_CONFUSED |= {"人": "入", "日": "曰", "未": "末", "己": "已", "病": "痛", "土": "士", "大": "犬", "的": "旳"}
_KEYS = "asdfghjklqwertyuiopzxcvbnm;,./[]"


def _is_han(text: str) -> bool:
    return sum("\u3400" <= c <= "\u9fff" for c in text) > 0.2 * len(text)


def shuffled(text: str, draw: random.Random) -> str:
    """Words (Chinese: characters) in random order, line by line."""
    lines = []
    for line in text.split("\n"):
        parts = list(line) if _is_han(line) else line.split(" ")
        draw.shuffle(parts)
        lines.append(("" if _is_han(line) else " ").join(parts))
    return "\n".join(lines)


def cut(text: str, draw: random.Random) -> str:
    """The text breaks off inside a word or sentence, and begins inside one."""
    size = len(text)
    return text[
        draw.randrange(5, max(6, size // 4)) : draw.randrange(size // 2, max(size // 2 + 1, size - 4))
    ]


def scanned(text: str, draw: random.Random) -> str:
    """Noise of a bad scan: look-alike characters, lost and added blanks, stray marks, broken words."""
    rate = draw.choice((0.06, 0.12, 0.2))
    out = []
    for c in text:
        if draw.random() >= rate:
            out.append(c)
        else:
            out.append(
                draw.choice((_CONFUSED.get(c, c), c + " ", "", c + draw.choice("~^|'.,;:"), "-\n" + c))
            )
    return "".join(out)


def repeated(text: str, draw: random.Random) -> str:
    """A sentence or phrase again and again."""
    size = draw.choice((20, 60, 150))
    start = draw.randrange(max(1, len(text) - size))
    piece = text[start : start + size].strip() or text[:size]
    return draw.choice((" ", "\n", "")).join([piece] * max(4, min(len(text), 900) // max(1, len(piece))))


def mashed(text: str, draw: random.Random) -> str:
    """Keys hit at random."""
    size = min(len(text), draw.choice((60, 200, 500)))
    return "".join(draw.choice(_KEYS) if draw.random() > 0.15 else " " for _ in range(size))


def padded(text: str, draw: random.Random) -> str:
    """A little text between the menus, notices and buttons of a web page."""
    english = [
        "Home | About | Contact | Login",
        "Accept all cookies to continue",
        "Share on Facebook Tweet Pin it Email",
        "Copyright 2021. All rights reserved. Terms of use. Privacy policy.",
        "Subscribe to our newsletter!",
        "Read more » Related posts » Next page »",
        "Loading... Please enable JavaScript",
        "0 comments. Leave a reply. Your email address will not be published.",
        "Skip to content Menu Search Close",
        "Page 1 of 12 < previous next >",
    ]
    chinese = [
        "首页 | 关于我们 | 联系方式 | 登录 注册",
        "点击下载APP 扫码关注公众号",
        "版权所有 未经授权禁止转载 京ICP备00000000号",
        "上一篇 下一篇 返回列表 相关推荐",
        "分享到：微信 微博 QQ空间",
        "请先登录后发表评论 评论(0)",
        "热门推荐 猜你喜欢 更多>>",
        "本站仅提供信息存储空间服务",
    ]
    lines = draw.sample(chinese if _is_han(text) else english, 6)
    piece = text[: draw.choice((0, 40, 120))]
    return "\n".join([*lines[:3], piece, *lines[3:]])


CORRUPTIONS: dict[str, tuple[Corruption, float]] = {
    "shuffled": (shuffled, 0.15),
    "cut": (cut, 0.6),
    "scanned": (scanned, 0.3),
    "repeated": (repeated, 0.1),
    "mashed": (mashed, 0.0),
    "padded": (padded, 0.15),
}
"""Name -> (what is done, the quality that is left). The numbers are ours."""
