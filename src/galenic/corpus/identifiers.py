"""What identifies a person in a clinical note, as patterns: English and Chinese.

Each rule is (category, pattern); what its group `x` matches, or the whole match, is the identifier. Rules lean on how
notes are written (labels, titles, forms of numbers), as no list of names or places comes with them. A rule errs on
the side of taking too much: a lost word costs a training text little.

The categories cover the 18 identifiers of the Safe Harbor method, 45 CFR 164.514(b)(2)(i): (A) names NAME; (B)
geographic subdivisions smaller than a state ADDRESS, HOSPITAL; (C) dates and ages over 89 DATE, AGE; (D, E) telephone
and fax numbers PHONE; (F) e-mail EMAIL; (G) social security, (H) medical record, (I) health plan, (J) account, (K)
certificate and licence numbers and (R) any other unique number ID; (L) vehicles VEHICLE; (M) devices DEVICE; (N) URL;
(O) IP. Biometric identifiers (P) and photographs (Q) are no text.
"""

import re
from collections.abc import Callable

Rule = tuple[str, re.Pattern[str], Callable[[str], bool] | None]
"""Category, pattern, and a test that the match must pass."""

# ---------------------------------------------------------------------------- tests of what was matched

NOT_NAMES = frozenset(
    """the a an and or of in on at to for from with by he she his her they it this that these those patient patients pt
    male female man woman boy girl mother father wife husband son daughter brother sister family history date time
    monday tuesday wednesday thursday friday saturday sunday january february march april may june july august
    september october november december cardiology radiology neurology surgery medicine oncology urology nephrology
    gastroenterology dermatology psychiatry orthopedics orthopaedics pediatrics paediatrics obstetrics gynecology
    gynaecology ophthalmology pathology pharmacy nursing emergency intensive care unit icu ed er department service
    clinic hospital ward team consult consultation primary general internal admission discharge diagnosis assessment
    plan impression findings exam examination physical laboratory labs vital signs medications allergies social review
    systems no not none yes unknown name nos hpi pmh chest abdomen head neck heart lung lungs left right bilateral
    acute chronic mild moderate severe normal abnormal negative positive physician doctor nurse attending resident
    provider signed dictated transcribed dr mr mrs ms prof also if when while due since after before during all
    anesthesia anaesthesia infectious disease social work case management physical therapy occupational home health
    interventional vascular thoracic plastic pain palliative rehabilitation""".split()
)
"""Capitalised words that follow a label or a title and are no names."""
_AFTER_TITLES = frozenset(
    """notified called aware paged will has had is was are were here in on to at from with said saw seen came updated
    informed ordered contacted requested recommended stated states wants want agreed would can could may should""".split()
)
"""What follows `dr` in notes without capitals, other than a name."""
_GENERIC_HOSPITALS = frozenset(
    "我 本 外 该 当地 上级 下级 某 综合 专科 三甲 基层 附近 社区 住 出 入 转 多家 其他 他 原 县级 市级 省级 各 大 小 公立 私立 互联网 中心 定点 精神病 传染病 儿童".split()
)
_CAPITAL = re.compile(r"[A-Z][\w'’-]*")


NOT_PLACES = frozenset(
    """table figure fig section stage class grade type phase group level chapter appendix part box step day week month
    english spanish chinese french german caucasian african american asian european western god internet medicare medicaid
    celsius fahrenheit doppler phase step""".split()
)


def is_place(text: str) -> bool:
    """True if the first word of a match could begin the name of a place."""
    first = text.split()[0].lower()
    return first not in NOT_NAMES and first not in NOT_PLACES


def is_name(text: str) -> bool:
    """True if some word of a match could be part of a name."""
    return any(word.lower() not in NOT_NAMES for word in _CAPITAL.findall(text))


def _lower_name(text: str) -> bool:
    return text not in NOT_NAMES and text not in _AFTER_TITLES


def resident_id(text: str) -> bool:
    """True for a Chinese resident number with the right check character (GB 11643-1999, ISO 7064 MOD 11-2).

    >>> resident_id("11010519491231002X"), resident_id("110105194912310021")
    (True, False)
    """
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(weight * int(digit) for weight, digit in zip(weights, text, strict=False))
    return "10X98765432"[total % 11] == text[17].upper()


def luhn(text: str) -> bool:
    """True for a card number with the right check digit (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in reversed(re.sub(r"\D", "", text))]
    return sum(d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits)) % 10 == 0


def _octets(text: str) -> bool:
    return all(int(part) < 256 for part in text.split("."))


def _named_hospital(text: str) -> bool:
    name = re.sub("(?:医院|卫生院|诊所|医学中心|疗养院|保健院).*", "", text)
    return bool(name) and name not in _GENERIC_HOSPITALS


# ---------------------------------------------------------------------------- numbers and dates, any language

_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)"
)
_DAY, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:19|20)\d\d"
_LABELLED = (
    r"MRN|MR|medical record|chart|hospital|acct|account|encounter|visit|accession|case|specimen|policy|member|subscriber|"
    r"insurance|group|health plan|medicaid|medicare|license|licence|DEA|NPI|certificate|passport|driver'?s licen[cs]e|SSN|"
    r"social security|NHS|claim|order|study|patient|employee|badge"
)
_NUMBER = r"(?=[\w/-]*\d)[A-Za-z0-9][\w/-]{2,}\w"


def _rules(*rows: tuple[str, str] | tuple[str, str, Callable[[str], bool]], flags: int = 0) -> list[Rule]:
    return [(row[0], re.compile(row[1], flags), row[2] if len(row) > 2 else None) for row in rows]


ANY = _rules(
    ("EMAIL", r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    ("URL", r"\b(?:https?://|www\.)[^\s<>\"'，。；）)]+"),
    ("IP", r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])", _octets),
    ("IP", r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![\w:])"),
    ("DEVICE", r"(?<![\w:])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![\w:])"),
    ("ID", r"(?<![\dXx])[1-9]\d{5}(?:18|19|20)\d{9}[\dXx](?!\d)", resident_id),
    ("ID", r"(?<!\d)[1-9]\d{5}\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}(?!\d)"),
    ("ID", r"(?<![\d.])(?:\d{4}[ -]){3}\d{3,4}(?![\d.])", luhn),
    ("ID", r"(?<![\d-])\d{3}-\d\d-\d{4}(?![\d-])"),
    # A long number that nothing explains; a count of cells or copies has its unit behind it.
    ("ID", r"(?<![\d.,/])[A-Z]{0,3}\d{8,}(?![\d.]*\s*(?:/|copies|cells|IU|units|×|个|拷贝))(?!\d)"),
    ("DATE", rf"(?<![\d./-]){_YEAR}([-/.])(?:0?[1-9]|1[0-2])\1{_DAY}(?![\d/-])"),
    ("DATE", rf"(?<![\d./-])(?:{_DAY})([-/.])(?:{_DAY})\1(?:{_YEAR}|\d\d)(?![\d/-])"),
    ("PHONE", r"(?<![\d.-])(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)"),
    ("PHONE", r"(?<![\d.-])[(（]?0\d{2,3}[)）]?[-－ ]?\d{7,8}(?:[-－转]\d{1,5})?(?!\d)"),
    (
        "PHONE",
        r"(?<![\d.-])(?:\+?1[-. ]?)?(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?:,?\s*(?:x|ext\.?)\s*\d+)?(?!\d)",
    ),
    ("PHONE", r"(?<![\w.])\+\d{1,3}(?:[ -]?\(?\d{1,4}\)?){2,5}(?!\d)"),
)

# ---------------------------------------------------------------------------- English

_CAP = r"(?:(?:Mc|Mac|De|O['’]|D['’])?[A-Z][a-zà-ÿ]+(?:[-'’][A-Z]?[a-zà-ÿ]+)*)"
_PARTICLE = r"(?:de|da|del|van|von|der|den|la|le|al|el|bin|ibn|dos)"
_WORDS = rf"(?:{_CAP}|[A-Z]\.)(?:[ \t]+(?:{_CAP}|[A-Z]\.|{_PARTICLE}(?=[ \t]+[A-Z]))){{0,3}}"
_FULL = rf"{_CAP}(?:[ \t]+[A-Z]\.?)?(?:[ \t]+{_PARTICLE})?(?:[ \t]+{_CAP}){{1,2}}"
_ANYCASE = r"[A-Z][\w'’.-]*(?:,?[ \t]+[A-Z][\w'’.-]*){0,3}"
_STATE = r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|T[NX]|UT|V[AT]|W[AIVY])"
_STREET = (
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Way|Terrace|Circle|Highway|Hwy"
    r"|Parkway|Pkwy|Square|Sq|Crescent|Close|Row)\b\.?"
)
_EPONYM = (
    r"(?i:diseases?|syndromes?|signs?|tests?|scores?|scales?|index|criteria|classification|position|incision|procedure|operation|catheter|"
    r"manoeuvre|maneuver|phenomenon|reflex|lymphoma|tumou?r|sarcoma|cells?|bodies|lines?|nodes?|palsy|an[a]?emia|fracture|hernia|stage|grade|"
    r"inventory|questionnaire|stain|ultrasound|needle|drain|tube|stent|valve|graft|ring|flap|approach|protocol|therapy|guidelines?)\b"
)
"""What follows a person's name in the name of a disease or an instrument."""
_TOWN = rf"{_CAP}(?:[ \t]+{_CAP}){{0,2}}"

ENGLISH = _rules(
    (
        "NAME",
        rf"\b(?:Dr|Mr|Mrs|Ms|Miss|Prof|Professor|Doctor|Nurse|Sister|Rev|Fr|Sir|Judge|Officer|Sgt)\b\.?[ \t]+(?P<x>{_WORDS})",
        is_name,
    ),
    ("NAME", rf"\b(?:DR|MR|MRS|MS)\b\.?[ \t]+(?P<x>{_ANYCASE})", is_name),
    (
        "NAME",
        rf"\b(?:Drs|Doctors|Messrs)\b\.?[ \t]+(?P<x>{_WORDS}(?:(?:, | and |, and | & ){_WORDS})*)",
        is_name,
    ),
    (
        "NAME",
        r"\b(?i:surgeon|assistant|an[a]?esthesi(?:ologist|a|st)|nurse|attending|resident|fellow|intern|consultant|supervisor|social worker|"
        rf"therapist|counsell?or|psychologist|dietitian|pharmacist|midwife|interpreter|roommate|landlord|teacher|coach)[ \t,]+(?P<x>{_WORDS})",
        is_name,
    ),
    (
        "NAME",
        rf"\b(?i:hi|dear|hello|thanks|thank you|sincerely|regards|cheers|best|yours)[ \t]*,?\s+(?P<x>{_WORDS})",
        is_name,
    ),
    (
        "NAME",
        rf"\b(?:met|saw|told|thanked|joined by|cared for by|followed by|care of|attn:?)[ \t]+(?P<x>{_FULL})",
        is_name,
    ),
    (
        "NAME",
        rf"\b(?P<x>{_FULL})(?=['’]s\b(?! (?:disease|syndrome|sign|test|score|scale|palsy|lymphoma|thyroiditis)))",
        is_name,
    ),
    (
        "NAME",
        rf"(?:^|(?<=[.!?;]\s)|(?<=\n))(?P<x>{_CAP})(?= (?:said|says|reports?|states?|denies|describe[sd]|lives|feels|wants|agree[sd]|told|thinks|asked|works|worries|wishes)\b)",
        is_name,
    ),
    ("NAME", r"\b(?:dr|mr|mrs|ms)\b\.?[ \t]+(?P<x>[a-z][a-z'’-]{2,})", _lower_name),
    (
        "NAME",
        rf"\b(?P<x>{_WORDS}),?[ \t]+(?:M\.?D|D\.?O|R\.?N|N\.?P|PA-C|Ph\.?D|LPN|CRNA|MBBS|LCSW|DDS|PharmD|FACS|FACC)\b",
        is_name,
    ),
    (
        "NAME",
        r"(?i:\b(?:patient(?:'s)?(?: name)?|pt|(?:first |last |full |maiden )?name|surname|attending(?: physician)?|(?:referring |primary |ordering )?physician|"
        r"provider|pcp|surgeon|assistant|anesthesi(?:ologist|a)|dictated by|(?:electronically )?signed(?: by)?|transcribed by|seen by|reviewed by|cc|next of kin|nok|"
        r"(?:emergency )?contact|guarantor|mother|father|spouse|guardian|resident|consultant|author|nurse|informant|historian|witness|interpreter)"
        rf"[ \t]*[:#][ \t]*)(?P<x>{_ANYCASE})",
        is_name,
    ),
    ("NAME", rf"\b(?:[Pp]t|[Pp]atient|PATIENT|PT)[ \t]+(?P<x>{_FULL})", is_name),
    (
        "NAME",
        r"\b(?:[Ss]poke (?:to|with)|[Dd]iscussed (?:\w+ ){0,3}with|[Cc]alled|[Ii]nformed|[Rr]eferred by|[Ss]een by|[Ee]valuated by|[Ee]xamined by|"
        rf"[Ss]igned by|[Pp]erformed by|[Rr]eviewed by|[Uu]nder the care of|[Aa]ccompanied by|[Rr]eferring|[Aa]sked|[Pp]aged|[Nn]otified|[Cc]ontacted|[Mm]et with|[Pp]er)[ \t]+(?P<x>{_FULL})",
        is_name,
    ),
    (
        "NAME",
        r"\b(?i:wife|husband|daughter|son|mother|father|sister|brother|partner|friend|neighbou?r|niece|nephew|aunt|uncle|grand(?:son|daughter|mother|father)|"
        rf"caregiver|carer|fianc[eé]e?|girlfriend|boyfriend|named|called|known as|nicknamed)[ \t,(]+(?P<x>{_WORDS})",
        is_name,
    ),
    (
        "NAME",
        rf"(?P<x>{_FULL})(?=,? (?:is|was|presents|presented|came|reports|reported|underwent|has|had|(?:a )?\d{{1,3}}[- ]?(?:year|yo|y/o|yr))\b)",
        is_name,
    ),
    (
        "NAME",
        r"\b(?P<x>[A-Z][A-Z'’-]+,[ \t]*[A-Z][A-Za-z'’-]+(?:[ \t]+[A-Z]\.?)?)(?=[ \t]*(?:\(|MRN|DOB|\d|$))",
        is_name,
    ),
    ("DATE", rf"(?i:\b{_MONTH}\.?[ \t]+{_DAY}(?:st|nd|rd|th)?(?:,?[ \t]+{_YEAR})?(?![\d/]))"),
    ("DATE", rf"(?i:\b{_DAY}(?:st|nd|rd|th)?[ \t-](?:of )?{_MONTH}\b\.?(?:,?[ \t-]+(?:{_YEAR}|\d\d\b))?)"),
    ("DATE", rf"(?i:\b{_MONTH}\.?,?[ \t]+(?:of )?{_YEAR}\b)"),
    ("DATE", rf"(?<![\d./])(?:0?[1-9]|1[0-2])/{_YEAR}(?![\d/])"),
    (
        "DATE",
        rf"(?i:\b(?:on|from|until|till|through|since|dated?|as of|by|before|after|due|this|next|last|DOB|D/C|adm)[ \t:]+)(?P<x>(?:0?[1-9]|1[0-2])/{_DAY})(?![\d/%])",
    ),
    ("AGE", r"(?i:\b(?P<x>(?:9\d|1[0-4]\d)[- ]?(?:years?|yrs?|y\.?/?o\.?|y)(?:[- ]?(?:old|of age))?)(?!\w))"),
    ("AGE", r"(?i:\b(?:aged?|age is|age of)[ \t:]+(?P<x>9\d|1[0-4]\d)\b(?![.%]))"),
    (
        "PHONE",
        r"(?i:\b(?:tel(?:ephone)?|phone|ph|fax|pager|beeper|cell|mobile|ext(?:ension)?|contact(?: number)?|call(?:back)?)\b(?: ?(?:no|number|#))?\.?[ \t:#]*)(?P<x>\+?\(?\d[\d ().-]{2,}\d)",
    ),
    (
        "ID",
        rf"(?i:\b(?:{_LABELLED})(?:[ \t]+(?:record|account))?(?:[ \t]*(?:no|number|num|id|identifier|#))?\.?[ \t]*(?:[:#]|is|of)[ \t#]*)(?P<x>{_NUMBER})",
    ),
    ("ID", rf"(?i:\b(?:{_LABELLED})[ \t]*(?:no\.?|number|num|id|identifier|#)[ \t]*)(?P<x>{_NUMBER})"),
    ("ID", rf"(?i:\b(?:MRN|SSN|DEA|NPI)[ \t]+)(?P<x>{_NUMBER})"),
    (
        "ID",
        rf"(?i:\b(?:{_LABELLED})[ \t]+)(?P<x>[A-Za-z]{{0,3}}(?=[\w-]*\d[\w-]*\d[\w-]*\d[\w-]*\d[\w-]*\d)[\w-]+)",
    ),
    ("ID", r"(?i:\b(?:card|account|number)s? (?:ending|ends)(?: in| with)? )(?P<x>\d{3,4})"),
    (
        "DEVICE",
        rf"(?i:\b(?:serial|device|lot|model|UDI|implant|generator|lead|ref)(?:[ \t]*(?:no|number|num|id|identifier|#|s/n))*\.?[ \t]*(?:[:#]|number|no\.)[ \t]*)(?P<x>{_NUMBER})",
    ),
    ("DEVICE", r"(?i:\b(?:ref|lot|serial|model)[ \t]+)(?P<x>[A-Z]{0,4}-?\d{5,}[\w-]*)"),
    ("DEVICE", rf"(?i:\bS/N[ \t:]*)(?P<x>{_NUMBER})"),
    (
        "VEHICLE",
        r"(?i:\b(?:licen[cs]e plate|plate|VIN|registration)(?:[ \t]*(?:no|number|#))?\.?[ \t:#]*)(?P<x>(?=[A-Za-z -]*\d)[A-Z0-9][A-Z0-9 -]{3,16}[A-Z0-9])",
    ),
    (
        "ADDRESS",
        rf"\b\d{{1,6}}[A-Za-z]?[ \t]+(?:(?:{_CAP}|[NSEW]\.?|\d+(?:st|nd|rd|th))[ \t]+){{1,4}}{_STREET}(?:,?[ \t]*(?:Apt|Apartment|Suite|Ste|Unit|Room|Rm|#)\.?[ \t]*[\w-]+)?"
        rf"(?:,?\s+{_TOWN}(?=,|[ \t]+{_STATE}\b))?(?:,?[ \t]+{_STATE}\b)?(?:,?[ \t]+\d{{5}}(?:-\d{{4}})?\b)?",
    ),
    ("ADDRESS", r"(?i:\bP\.?O\.? box \d+)"),
    ("ADDRESS", rf"\b{_TOWN},[ \t]+{_STATE}\b(?:[ \t]+\d{{5}}(?:-\d{{4}})?\b)?"),
    ("ADDRESS", rf"\b{_STATE}[ \t]+\d{{5}}(?:-\d{{4}})?\b"),
    ("ADDRESS", r"\b(?:[A-Z]{1,2}\d[A-Z\d]?[ \t]\d[A-Z]{2})\b"),
    ("ADDRESS", r"(?i:\b(?:zip|postal|post)[ \t]?code)[ \t:]*(?P<x>[A-Z0-9][A-Z0-9 -]{3,8}[A-Z0-9])"),
    (
        "ADDRESS",
        r"(?i:\b(?:(?:home |mailing |street )?address|residence|city|town|county)[ \t]*:[ \t]*)(?P<x>[^\n;]{3,80})",
    ),
    (
        "ADDRESS",
        r"\b(?:[Ll]iv(?:es?|ed|ing)(?: alone| independently| with \w+ \w+)? in|[Rr]esid(?:es?|ed|ing) in|[Rr]esident of|[Oo]riginally from|[Mm]oved (?:here )?(?:from|to)|[Bb]orn in|"
        rf"[Tt]ravel(?:l?ed|s) (?:from|to)|[Tt]rip to|[Vv]isit(?:ed|ing)|[Rr]eturned from|[Tt]ransferred from|[Nn]ative of|[Hh]ails from)[ \t]+(?P<x>{_TOWN}(?:,[ \t]+{_TOWN})?)",
        is_name,
    ),
    (
        "ADDRESS",
        rf"\b(?:in|from|to|near|outside|at)[ \t]+(?P<x>{_CAP}(?:[ \t]+{_CAP}){{0,2}})(?!['’]s|[ \t]+{_EPONYM})",
        is_place,
    ),
    (
        "HOSPITAL",
        r"(?i:\b(?:facility|hospital|clinic|institution)(?: name)?[ \t]*:[ \t]*)(?P<x>[A-Z][^\n,;]{2,60})",
    ),
    ("HOSPITAL", rf"\bHospital (?:of|for) (?:the )?{_TOWN}"),
    (
        "HOSPITAL",
        rf"\b(?:{_CAP}(?:['’]s)?|St\.)(?:[ \t]+(?:{_CAP}(?:['’]s)?|of|the|and|&|for|St\.)){{0,5}}[ \t]+"
        r"(?:Hospital|Medical Cent(?:er|re)|Clinic|Infirmary|Nursing Home|Hospice|Health Cent(?:er|re)|Rehab(?:ilitation)?(?: Cent(?:er|re))?|Healthcare|Health System|Surgery Cent(?:er|re)|Care Home|Manor)\b",
        is_name,
    ),
)

# ---------------------------------------------------------------------------- Chinese

_SURNAMES = (
    "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦尤许何吕施张孔曹严华金魏陶姜戚谢邹喻柏窦章苏潘葛奚范彭郎鲁韦马苗花俞袁柳鲍史唐费廉岑薛雷贺倪汤滕殷罗毕郝邬"
    "乐傅皮卞齐康伍余元卜顾孟黄穆萧尹姚邵湛汪祁毛禹狄米贝臧戴谈宋茅庞熊纪舒屈项祝董梁杜阮蓝闵席季贾娄江童颜郭梅盛林刁钟徐邱骆夏蔡田樊胡凌霍虞万柯卢莫"
    "房裘缪解丁邓洪包左石崔吉龚程邢裴陆荣翁荀惠曲封储靳焦谷车侯宁仇甘厉祖武符刘景詹龙叶黎白蒲赖卓蔺屠池乔胥申冉桑桂牛尚温庄晏柴瞿阎连习艾容古易廖耿匡"
    "寇欧沃关肖涂聂辛简饶曾沙鞠巫高于安常任方时严单"
)
_COMPOUND = "欧阳|上官|司马|诸葛|夏侯|皇甫|尉迟|公孙|令狐|慕容|司徒|端木|东方|南宫|独孤|宇文|长孙|呼延"
_UNCERTAIN = "高于安常任方时严单白黄温何易石左江花万乐解金连关包米牛车古皮元毛田马龙康宁"
"""Surnames that begin other words after `患者`: 高热, 于今日, 黄疸 ..."""
_SURE = "".join(sorted(set(_SURNAMES) - set(_UNCERTAIN)))
_HAN = r"[\u3400-\u9fff]"
_NAME = rf"(?:(?:{_COMPOUND})|[{_SURNAMES}]){_HAN}{{1,2}}"
_SURE_NAME = rf"(?:(?:{_COMPOUND})|[{_SURE}]){_HAN}{{1,2}}"
_TITLE = "(?:主任医师|副主任医师|主治医师|住院医师|副主任|主任|医生|医师|大夫|教授|护士长|护师|护士|先生|女士|老师|院长|药师|技师)"
_RELATION = (
    "妻子|丈夫|儿子|女儿|父亲|母亲|配偶|长子|次子|长女|次女|弟弟|姐姐|哥哥|妹妹|爱人|儿媳|女婿|孙子|孙女|朋友|同事|邻居|护工|老伴|监护人"
    "|侄子|侄女|外甥|外甥女|兄长|嫂子|岳父|岳母|公公|婆婆|爷爷|奶奶|姑姑|舅舅|叔叔|阿姨|室友|同学|司机|保姆|其兄|其弟|其姐|其妹|其父|其母|其妻|其夫|其子|其女"
)
_DIGITS = "[〇零一二三四五六七八九十0-9０-９]"
_PROVINCE = (
    "(?:北京|天津|上海|重庆|河北|山西|辽宁|吉林|黑龙江|江苏|浙江|安徽|福建|江西|山东|河南|湖北|湖南|广东|海南|四川|贵州|云南|陕西|甘肃|青海|台湾|内蒙古|广西|西藏"
    "|宁夏|新疆|香港|澳门)"
)
_UNIT = (
    r"(?:[\u3400-\u9fff]{1,8}?(?:自治区|自治州|自治县|省|市|区|县|旗|州|盟|镇|乡|街道|村|屯|路|街|大道|巷|弄|胡同|小区|花园|苑|社区|新村|家园|公寓|大厦|里)"
    r"|[0-9０-９一二三四五六七八九十A-Za-z-]{1,6}(?:组|号楼|号院|号|栋|幢|单元|室|楼|层|队|座|弄))"
)
_CUT = "于在到至往由从赴抵来回及与入住经送转去被向曾后为，。；、：\\s"
_PLACE = "(?:医院|卫生院|卫生服务中心|卫生服务站|诊所|疗养院|保健院|急救中心|医学中心|养老院|福利院)"

CHINESE = _rules(
    (
        "NAME",
        r"(?:姓\s*名|联系人|家属(?:签[名字])?|(?:患者|医师|医生|护士)?签[名字]|(?:主管|主治|经治|住院|主任|上级|管床|首诊|接诊|会诊|送检|申请|报告|审核|记录|值班|责任|手术)(?:医师|医生|护士|者|人)"
        r"|医\s*[师生]|记录[者人]|陈述者|供史者|监护人|术者|主刀|[一二]助|助手|麻醉(?:师|医师|者)|护士|配偶|父亲|母亲|病史提供者|曾用名|别名)\s*[:：]\s*(?P<x>[\u3400-\u9fff·]{2,4}(?![\u3400-\u9fff])|"
        + _NAME
        + ")",
    ),
    ("NAME", rf"(?<![\u3400-\u9fff])(?P<x>{_NAME})(?=[，,、\s]{{0,2}}(?:男|女)[，,。\s性、；])"),
    (
        "NAME",
        rf"(?:患者|病人|患儿|产妇|孕妇|伤者|死者|老人|受试者)(?P<x>{_NAME})(?=[，,、（(\s]{{0,2}}(?:男|女|性别|住院号|病案号|\d{{1,3}}岁))",
    ),
    (
        "NAME",
        rf"(?:患者|病人|患儿|产妇|孕妇|伤者|死者|老人|受试者)(?P<x>{_SURE_NAME})(?=[，,。（(\s]|因|于|系|自|主因|诉|入院|今|昨|既往|无明显|的|由|家属)",
    ),
    (
        "NAME",
        rf"(?P<x>(?:(?:{_COMPOUND})|[{_SURNAMES}]){_HAN}{{0,2}}?)(?={_TITLE})(?<!高年)(?<!高级)(?<!华佗)",
    ),
    (
        "NAME",
        rf"(?:{_RELATION}|家属|之子|之女)(?P<x>{_NAME})(?=[（(，,。、\s]|陪同|陪护|代述|代诉|签字|诉|电话|联系|送|照|护|要求|表示|同意|[:：])",
    ),
    ("NAME", rf"(?:{_RELATION})(?P<x>{_SURE_NAME})"),
    (
        "NAME",
        rf"(?:由|请|经|与|向|同|告知|电话通知)(?P<x>{_NAME})(?=(?:会诊|主刀|签字|完成|操作|手术|查房|联系|沟通|陪同|交代))",
    ),
    (
        "NAME",
        rf"(?<![\u3400-\u9fff])(?P<x>{_SURE_NAME})(?=的(?:病理|检查|检验|化验|病情|家属|妻|丈夫|父|母|儿|女|手术|报告|诊断|血|尿))",
    ),
    (
        "NAME",
        r"(?:术者|手术者|[一二三]助|助手|(?:洗手|巡回|责任|器械|值班)护士|麻醉(?:师|医师|者)|主刀|指导者|记录者?|签名|交班者|接班者|病人|患者|患儿|伤员|产妇)"
        rf"[ \t　:：]*(?P<x>{_NAME})(?=[\s（(、/]|$)",
    ),
    (
        "NAME",
        rf"(?:^|(?<=[，。；、：:\s]))(?P<x>{_SURE_NAME})(?=(?:自|于|在|到|说|诉|表示|因|夜间|床旁|床边|敬上|谨上|书|签|昨|今|一般|入院|出院|术后|目前|本人|送|陪))",
    ),
    (
        "NAME",
        rf"(?:联系|找|介绍|通知|告知|陪同者?为|随访|代办人|转交|致电|电话询问)(?P<x>{_SURE_NAME})(?=[，。、；\s（(]|$)",
    ),
    ("NAME", rf"(?P<x>[{_SURNAMES}]某{{1,2}}|[{_SURNAMES}][×Xx*＊]{{1,2}})(?![A-Za-z\d])"),
    (
        "DATE",
        rf"(?:{_YEAR}|(?<!\d)\d\d|[一二][〇零九][〇零一二三四五六七八九]{{2}})\s*年\s*{_DIGITS}{{1,3}}\s*月(?:\s*{_DIGITS}{{1,3}}\s*[日号])?",
    ),
    ("DATE", rf"(?<![\d年]){_DIGITS}{{1,2}}\s*月\s*{_DIGITS}{{1,3}}\s*[日号]"),
    (
        "DATE",
        rf"(?:农历|阴历|公历)[\u3400-\u9fff]{{0,4}}(?:正|腊|{_DIGITS}{{1,2}})月(?:初|廿|{_DIGITS}){{1,3}}",
    ),
    (
        "DATE",
        rf"(?:于|自|至|从|到|在)(?P<x>(?:0?[1-9]|1[0-2])[-/.]{_DAY})(?![\d.%/]|\s*(?:mm|cm|g|mg|ml|次|天|个|倍))",
    ),
    ("AGE", r"(?<!\d)(?P<x>(?:9\d|1[0-4]\d)\s*(?:周岁|岁))"),
    ("AGE", r"年龄\s*[:：]\s*(?P<x>9\d|1[0-4]\d)(?!\d)"),
    (
        "PHONE",
        r"(?:电话|手机|传真|联系方式|热线|座机|分机|小灵通|微信|QQ)(?:号码?)?\s*[:：]?\s*(?P<x>[+\d][\d ()（）－-]{3,}\d)",
    ),
    ("ID", r"(?:微信|QQ)(?:号码?)?\s*[:：]\s*(?P<x>[A-Za-z0-9_-]{5,})"),
    (
        "ID",
        r"(?:住院|病案|门诊|病历|病历本|登记|检查|检验|标本|条码|影像|超声|病理|放射|医保|医保卡|社保|社保卡|就诊卡|诊疗卡|银行卡|卡|账|帐|护照|身份证|身份证件|证件|执业证|执业证书|医师资格证|保单|流水|CT|MRI|X线|X光|内镜|心电图|"
        r"样本|试验|受试者|军官证|港澳通行证|合同|发票|处方|患者|病员|ID)(?:号码|编号|号|ID|No\.?)\s*[:：为是]?\s*(?P<x>(?=[\w-]*\d)[A-Za-z0-9][\w-]{3,})",
    ),
    (
        "DEVICE",
        r"(?:序列号|设备号|设备编号|器械编号|产品编号|批号|出厂编号)\s*[:：为]?\s*(?P<x>(?=[\w-]*\d)[A-Za-z0-9][\w-]{3,})",
    ),
    (
        "VEHICLE",
        r"[京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼][A-Z][·・ ]?[A-HJ-NP-Z0-9]{5,6}(?![A-Z0-9])",
    ),
    (
        "ADDRESS",
        r"(?:住\s*址|地\s*址|现住址|家庭住址|户籍(?:地址|所在地)?|户口(?:地址|所在地)|工作单位|单位|籍\s*贯|出生地|通讯处)\s*[:：]\s*(?P<x>[^\n，。；;\s]{2,60})",
    ),
    ("ADDRESS", rf"{_PROVINCE}(?:省|市|壮族自治区|回族自治区|维吾尔自治区|自治区|特别行政区)?{_UNIT}+"),
    (
        "ADDRESS",
        rf"(?:居住|现住|家住|住|来自|户籍|籍贯|生于|出生于|出生|久居|长期居住|生活|务工|老家|返回|前往|途经)(?:于|在|地|是)?(?P<x>{_UNIT}{{1,8}})",
    ),
    ("ADDRESS", rf"(?P<x>[\u3400-\u9fff]{{2,4}}(?:市|县|区){_UNIT}+)(?![\u3400-\u9fff]{{0,8}}{_PLACE})"),
    ("ADDRESS", r"(?:邮编|邮政编码)\s*[:：]?\s*(?P<x>\d{6})"),
    (
        "HOSPITAL",
        rf"(?P<x>[^{_CUT}\W\d_A-Za-z]{{1,20}}{_PLACE}(?:[\u3400-\u9fff]{{1,6}}(?:分院|院区))?)",
        _named_hospital,
    ),
)
HAN = re.compile(_HAN)
SURNAME = re.compile(rf"(?:{_COMPOUND})|[{_SURNAMES}]")
EPONYM = re.compile(rf"(?:['’]s)?[ \t]+{_EPONYM}")
"""Matches behind a name that belongs to a disease or an instrument."""
