"""Phrases that tell boilerplate, placeholders and advertisements, and the automaton that finds them all at once.

The lists are this project's own and short on purpose: each phrase is one that a page around a text says and a text on
medicine does not. What a text may well say ("share", "cookies", "根治" as in 根治术, radical surgery) is only here as
part of something longer; "来源：" (source) begins monographs of herbs, ICP is intracranial pressure. Letters count in
either case. A line goes whole or stays whole.
"""

import functools
from typing import NamedTuple

import numpy as np

ANYWHERE = (
    # rights and imprints
    "all rights reserved", "copyright ©", "copyright (c)", "© copyright", "powered by wordpress",
    "terms of use |", "privacy policy |", "| privacy policy", "terms of service and privacy policy",
    "版权所有", "版权归原作者", "未经授权不得转载", "未经许可不得转载", "转载请注明", "本文来源于网络",
    "如有侵权", "责任编辑", "责编：", "icp备", "公网安备", "不代表本站立场", "不代表本网观点",
    # cookies and scripts
    "we use cookies", "uses cookies to", "accept all cookies", "cookie policy", "cookie settings",
    "manage cookies", "enable javascript", "javascript is disabled", "javascript is required",
    "requires javascript", "turn on javascript", "your browser does not support", "请启用javascript",
    "浏览器不支持", "浏览器版本过低",
    # subscriptions and sharing
    "subscribe to our newsletter", "sign up for our newsletter", "sign up to our newsletter",
    "join our mailing list", "unsubscribe at any time", "follow us on", "like us on facebook",
    "share this article", "share on facebook", "share on twitter", "tweet this", "pin it on pinterest",
    "email this blogthis", "扫码关注", "扫描二维码关注", "扫描二维码下载", "长按二维码", "识别二维码", "关注公众号",
    "关注微信公众号", "关注我们的微信", "分享到朋友圈", "分享到微信", "点击下方名片", "点赞收藏", "点个在看",
    "一键三连",
    # navigation
    "skip to main content", "skip to content", "jump to navigation", "toggle navigation", "back to top",
    "click here to", "leave a comment", "leave a reply", "your email address will not be published",
    "required fields are marked", "log in to post", "you must be logged in", "add to wishlist",
    "page not found", "view all posts by", "当前位置：", "您的位置：", "您所在的位置", "返回首页", "返回顶部",
    "设为首页", "加入收藏", "点击查看", "点击阅读全文", "阅读原文", "展开全文", "网站地图", "登录后发表评论",
    "发表评论", "网友评论", "相关阅读：", "相关推荐：", "友情链接",
)  # fmt: skip
"""In a line of at most `LONGEST_CONTAINING` bytes."""

AT_THE_START = (
    "share on", "share this", "share:", "tags:", "filed under:", "posted in:", "posted by", "posted on",
    "read more", "continue reading", "related posts", "related articles", "you may also like",
    "previous post", "next post", "previous article", "next article", "« previous", "next »", "home >",
    "home »", "home /", "home |", "advertisement", "sponsored content", "print this page", "email this",
    "loading...", "copyright ", "newsletter sign", "© ", "上一篇", "下一篇", "上一页", "下一页", "相关文章",
    "热门文章", "推荐阅读", "延伸阅读", "猜你喜欢", "首页 >", "首页>", "首页 »", "分享到", "标签：",
    "作者：", "编辑：", "发布时间：", "浏览次数", "阅读次数", "点击数：", "上一条", "下一条",
)  # fmt: skip
"""At the start of a line of at most `LONGEST_BEGINNING` bytes."""

PLACEHOLDERS = ("lorem ipsum",)
"""No text that has one says anything (C4)."""

ADVERTS = (
    "buy now", "order now", "order today", "shop now", "call now", "act now", "add to cart", "free shipping",
    "money-back guarantee", "money back guarantee", "limited time offer", "limited-time offer",
    "special offer", "promo code", "discount code", "coupon code", "try it risk-free",
    "100% natural", "all-natural formula", "as seen on tv", "lose weight fast", "melt away fat",
    "boost your metabolism", "miracle cure", "doctors hate", "results may vary", "while supplies last",
    "立即购买", "立即订购", "立即抢购", "限时优惠", "限时特价", "优惠价", "原价", "包邮", "秒杀", "加微信",
    "添加微信", "免费咨询", "在线咨询", "咨询热线", "订购热线", "免费热线", "货到付款", "无效退款",
    "假一赔十", "厂家直销", "祖传秘方", "彻底根治", "永不复发", "包治百病", "药到病除", "无任何副作用",
    "一个疗程见效", "纯天然无", "名额有限", "招商加盟", "诚招代理", "点击领取", "免费领取", "专家在线",
)  # fmt: skip
"""At most 64 of health and wellness advertising; one says nothing, several in a short text do."""

LONGEST_CONTAINING, LONGEST_BEGINNING = 200, 90
"""Bytes of a line: of Latin letters as many, of Han characters a third. A longer line says something else, too."""
CONTAINS, BEGINS, PLACEHOLDER, ADVERT = 1, 2, 4, 8
"""Marks of a state; built into what `tidy` compiles, so touch that file if they change."""


class Automaton(NamedTuple):
    """Aho and Corasick's automaton (1975) over bytes, each state with what ends there."""

    symbol: np.ndarray
    """(256,) uint8: which column of `move` a byte has; upper-case letters that of lower-case ones, unused bytes 0."""
    move: np.ndarray
    """(states * symbols,) uint32: twice where the next state's row begins, plus one if the next state has marks."""
    symbols: int
    """Entries of a row."""
    marks: np.ndarray
    """(states,) uint8: CONTAINS, PLACEHOLDER, ADVERT if such a phrase ends here; BEGINS if the whole state is one."""
    depth: np.ndarray
    """(states,) uint8: bytes of the state."""
    adverts: np.ndarray
    """(states,) uint64: a bit for each phrase of ADVERTS that ends here."""
    longest_containing: int
    longest_beginning: int


@functools.cache
def automaton() -> Automaton:
    """Returns the automaton of the phrases above."""
    kinds = [(ANYWHERE, CONTAINS), (AT_THE_START, BEGINS), (PLACEHOLDERS, PLACEHOLDER), (ADVERTS, ADVERT)]
    used = sorted({byte for phrases, _ in kinds for phrase in phrases for byte in phrase.encode()})
    symbol = np.zeros(256, dtype=np.uint8)
    symbol[used] = np.arange(1, len(used) + 1)
    symbol[ord("A") : ord("Z") + 1] = symbol[ord("a") : ord("z") + 1]
    children: list[dict[int, int]] = [{}]
    marks, depth, adverts = [0], [0], [0]
    for phrases, kind in kinds:
        for number, phrase in enumerate(phrases):
            state = 0
            for byte in phrase.encode():
                if int(symbol[byte]) not in children[state]:
                    children[state][int(symbol[byte])] = len(children)
                    children.append({})
                    marks.append(0)
                    depth.append(depth[state] + 1)
                    adverts.append(0)
                state = children[state][int(symbol[byte])]
            marks[state] |= kind
            adverts[state] |= 1 << number if kind == ADVERT else 0
    # Breadth first: the longest proper suffix of a state that is a state is known before it is asked for.
    move = np.zeros((len(children), len(used) + 1), dtype=np.int16)
    suffix, queue = [0] * len(children), [0]
    for state in queue:
        move[state] = move[suffix[state]] if state else 0
        for column, child in children[state].items():
            suffix[child] = int(move[state, column])  # still that of the suffix; 0 at the root
            move[state, column] = child
            marks[child] |= marks[suffix[child]] & ~BEGINS
            adverts[child] |= adverts[suffix[child]]
            queue.append(child)
    marked = np.array(marks, dtype=np.uint8)
    rows = 2 * move.shape[1] * move.astype(np.uint32) + (marked[move] > 0)
    return Automaton(
        symbol,
        rows.ravel().astype(np.uint32),
        move.shape[1],
        marked,
        np.array(depth, dtype=np.uint8),
        np.array(adverts, dtype=np.uint64),
        LONGEST_CONTAINING,
        LONGEST_BEGINNING,
    )
