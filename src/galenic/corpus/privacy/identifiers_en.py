"""How identifiers are written in English notes: after labels and titles, before what only people do."""

import re

from galenic.corpus.privacy.identifiers import DAY, MONTH, YEAR, rules

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
    anesthesia anaesthesia infectious disease work case management therapy occupational home health interventional
    vascular thoracic plastic pain palliative rehabilitation""".split()
)
"""Capitalised words that follow a label or a title and are no names."""
NOT_PLACES = NOT_NAMES.union(
    """table figure fig section stage class grade type phase group level chapter appendix part box step day week month
    english spanish chinese french german caucasian african american asian european western god internet medicare
    medicaid celsius fahrenheit doppler""".split()
)
_AFTER_TITLES = NOT_NAMES.union(
    """notified called aware paged will has had is was are were here in on to at from with said saw seen came updated
    informed ordered contacted requested recommended stated states wants want agreed would can could may
    should""".split()
)
"""What follows `dr` in notes without capitals, other than a name."""
_CAPITAL = re.compile(r"[A-Z][\w'’-]*")


def is_name(text: str) -> bool:
    """True if some word of a match could be part of a name."""
    return any(word.lower() not in NOT_NAMES for word in _CAPITAL.findall(text))


def is_place(text: str) -> bool:
    """True if the first word of a match could begin the name of a place."""
    return text.split()[0].lower() not in NOT_PLACES


def _is_lower_name(text: str) -> bool:
    return text not in _AFTER_TITLES


# ---------------------------------------------------------------------------- parts

_CAP = r"(?:(?:Mc|Mac|De|O['’]|D['’])?[A-Z][a-zà-ÿ]+(?:[-'’][A-Z]?[a-zà-ÿ]+)*)"
_GAP = r"[ \t]+(?:(?:de|da|del|van|von|der|den|la|le|al|el|bin|ibn|dos)[ \t]+){0,2}"
"""Between parts of a name: perhaps particles."""
_WORDS = rf"(?:{_CAP}|[A-Z]\.)(?:{_GAP}(?:{_CAP}|[A-Z]\.)){{0,3}}"
"""Any name, perhaps only one word; for where it is known that a name follows."""
_FULL = rf"{_CAP}(?:[ \t]+[A-Z]\.?)?(?:{_GAP}{_CAP}){{1,2}}"
"""Two or three capitalised words."""
_ANYCASE = rf"[A-Z][\w'’.-]*(?:,?{_GAP}[A-Z][\w'’.-]*){{0,3}}"
_TOWN = rf"{_CAP}(?:[ \t]+{_CAP}){{0,2}}"
_STATE = (
    r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|T[NX]|UT"
    r"|V[AT]|W[AIVY])"
)
_ZIP = r"\d{5}(?:-\d{4})?\b"
_STREET = (
    r"(?:Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Place|Pl|Way|Terrace|Circle"
    r"|Highway|Hwy|Parkway|Pkwy|Square|Sq|Crescent|Close|Row)\b\.?"
)
_EPONYM = (
    r"(?i:diseases?|syndromes?|signs?|tests?|scores?|scales?|index|criteria|classification|position|incision"
    r"|procedure|operation|catheter|manoeuvre|maneuver|phenomenon|reflex|lymphoma|tumou?r|sarcoma|cells?|bodies"
    r"|lines?|nodes?|palsy|ana?emia|fracture|hernia|stage|grade|inventory|questionnaire|stain|ultrasound|needle"
    r"|drain|tube|stent|valve|graft|ring|flap|approach|protocol|therapy|thyroiditis|guidelines?)\b"
)
EPONYM = re.compile(rf"(?:['’]s)?[ \t]+{_EPONYM}")
"""Matches behind a name that belongs to a disease or an instrument."""
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?"
    r"|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_ROLE = (
    r"(?i:surgeon|assistant|ana?esthesi(?:ologist|a|st)|nurse|attending|resident|fellow|intern|consultant"
    r"|supervisor|social worker|therapist|counsell?or|psychologist|dietitian|pharmacist|midwife|interpreter"
    r"|roommate|landlord|teacher|coach)"
)
_NAME_LABEL = (
    r"(?i:\b(?:patient(?:'s)?(?: name)?|pt|(?:first |last |full |maiden )?name|surname|attending(?: physician)?"
    r"|(?:referring |primary |ordering )?physician|provider|pcp|surgeon|assistant|anesthesi(?:ologist|a)"
    r"|dictated by|(?:electronically )?signed(?: by)?|transcribed by|seen by|reviewed by|cc|next of kin|nok"
    r"|(?:emergency )?contact|guarantor|mother|father|spouse|guardian|resident|consultant|author|nurse|informant"
    r"|historian|witness|interpreter)[ \t]*[:#][ \t]*)"
)
_DOING = (
    r"\b(?:[Ss]poke (?:to|with)|[Dd]iscussed (?:\w+ ){0,3}with|[Cc]alled|[Ii]nformed|[Rr]eferred by|[Ss]een by"
    r"|[Ee]valuated by|[Ee]xamined by|[Ss]igned by|[Pp]erformed by|[Rr]eviewed by|[Uu]nder the care of"
    r"|[Aa]ccompanied by|[Rr]eferring|[Aa]sked|[Pp]aged|[Nn]otified|[Cc]ontacted|[Mm]et(?: with)?|saw|told"
    r"|thanked|joined by|cared for by|followed by|care of|attn:?|[Pp]er|[Pp]t|[Pp]atient|PATIENT|PT)"
)
_RELATIVE = (
    r"(?i:wife|husband|daughter|son|mother|father|sister|brother|partner|friend|neighbou?r|niece|nephew|aunt"
    r"|uncle|grand(?:son|daughter|mother|father)|caregiver|carer|fianc[eé]e?|girlfriend|boyfriend|named|called"
    r"|known as|nicknamed)"
)
_SAYS = (
    r"(?:said|says|reports?|states?|denies|describe[sd]|lives|feels|wants|agree[sd]|told|thinks|asked|works"
    r"|worries|wishes)"
)
_IS = r"(?:is|was|presents|presented|came|reports|reported|underwent|has|had|(?:a )?\d{1,3}[- ]?(?:year|yo|y/o|yr))"
_CREDENTIAL = r"(?:M\.?D|D\.?O|R\.?N|N\.?P|PA-C|Ph\.?D|LPN|CRNA|MBBS|LCSW|DDS|PharmD|FACS|FACC)"
_NUMBERED = (
    r"(?:MRN|MR|medical record|chart|hospital|acct|account|encounter|visit|accession|case|specimen|policy|member"
    r"|subscriber|insurance|group|health plan|medicaid|medicare|license|licence|DEA|NPI|certificate|passport"
    r"|driver'?s licen[cs]e|SSN|social security|NHS|claim|order|study|patient|employee|badge)"
)
_NO = r"(?:no\.?|number|num|id|identifier|#)"
_NUMBER = r"(?=[\w/-]{0,30}\d)[A-Za-z0-9][\w/-]{2,}\w"
_CALL = (
    r"(?i:\b(?:tel(?:ephone)?|phone|ph|fax|pager|beeper|cell|mobile|ext(?:ension)?|contact(?: number)?"
    r"|call(?:back)?)\b(?: ?(?:no|number|#))?\.?[ \t:#]*)"
)
_LIVES = (
    r"\b(?:[Ll]iv(?:es?|ed|ing)(?: alone| independently| with \w+ \w+)? in|[Rr]esid(?:es?|ed|ing) in"
    r"|[Rr]esident of|[Oo]riginally from|[Mm]oved (?:here )?(?:from|to)|[Bb]orn in|[Tt]ravel(?:l?ed|s) (?:from|to)"
    r"|[Tt]rip to|[Vv]isit(?:ed|ing)|[Rr]eturned from|[Tt]ransferred from|[Nn]ative of|[Hh]ails from)"
)
_FACILITY = (
    r"(?:Hospital|Medical Cent(?:er|re)|Clinic|Infirmary|Nursing Home|Hospice|Health Cent(?:er|re)"
    r"|Rehab(?:ilitation)?(?: Cent(?:er|re))?|Healthcare|Health System|Surgery Cent(?:er|re)|Care Home|Manor)\b"
)

# ---------------------------------------------------------------------------- rules

ENGLISH = [
    *rules(
        "NAME",
        [
            # Titles, roles, labels, greetings.
            r"\b(?:Dr|Mr|Mrs|Ms|Miss|Prof|Professor|Doctor|Nurse|Sister|Rev|Fr|Sir|Judge|Officer|Sgt)\b\.?[ \t]+"
            rf"(?P<x>{_WORDS})",
            rf"\b(?:DR|MR|MRS|MS)\b\.?[ \t]+(?P<x>{_ANYCASE})",
            rf"\b(?:Drs|Doctors|Messrs)\b\.?[ \t]+(?P<x>{_WORDS}(?:(?:, | and |, and | & ){_WORDS})*)",
            rf"\b{_ROLE}[ \t,]+(?P<x>{_WORDS})",
            rf"{_NAME_LABEL}(?P<x>{_ANYCASE})",
            r"\b(?i:hi|dear|hello|thanks|thank you|sincerely|regards|cheers|best|yours)[ \t]*,?\s+"
            rf"(?P<x>{_WORDS})",
            rf"\b(?P<x>{_WORDS}),?[ \t]+{_CREDENTIAL}\b",
            r"\b(?P<x>[A-Z][A-Z'’-]+,[ \t]*[A-Z][A-Za-z'’-]+(?:[ \t]+[A-Z]\.?)?)(?=[ \t]*(?:\(|MRN|DOB|\d|$))",
            # What only people do, own or are.
            rf"{_DOING}[ \t]+(?P<x>{_FULL})",
            rf"\b{_RELATIVE}[ \t,(]+(?P<x>{_WORDS})",
            rf"\b(?P<x>{_FULL})(?=['’]s\b(?! {_EPONYM}))",
            rf"(?:^|(?<=[.!?;]\s)|(?<=\n))(?P<x>{_CAP})(?= {_SAYS}\b)",
            rf"(?P<x>{_FULL})(?=,? {_IS}\b)",
        ],
        is_name,
    ),
    *rules("NAME", [r"\b(?:dr|mr|mrs|ms)\b\.?[ \t]+(?P<x>[a-z][a-z'’-]{2,})"], _is_lower_name),
    *rules(
        "DATE",
        [
            rf"(?i:\b{_MONTH}\.?[ \t]+{DAY}(?:st|nd|rd|th)?(?:,?[ \t]+{YEAR})?(?![\d/]))",
            rf"(?i:\b{DAY}(?:st|nd|rd|th)?[ \t-](?:of )?{_MONTH}\b\.?(?:,?[ \t-]+(?:{YEAR}|\d\d\b))?)",
            rf"(?i:\b{_MONTH}\.?,?[ \t]+(?:of )?{YEAR}\b)",
            rf"(?<![\d./]){MONTH}/{YEAR}(?![\d/])",
            # 3/12 alone may be a strength, a murmur, a score.
            r"(?i:\b(?:on|from|until|till|through|since|dated?|as of|by|before|after|due|this|next|last|DOB|D/C|adm)"
            rf"[ \t:]+)(?P<x>{MONTH}/{DAY})(?![\d/%])",
        ],
    ),
    *rules(
        "AGE",
        [
            r"(?i:\b(?P<x>(?:9\d|1[0-4]\d)[- ]?(?:years?|yrs?|y\.?/?o\.?|y)(?:[- ]?(?:old|of age))?)(?!\w))",
            r"(?i:\b(?:aged?|age is|age of)[ \t:]+(?P<x>9\d|1[0-4]\d)\b(?![.%]))",
        ],
    ),
    *rules("PHONE", [rf"{_CALL}(?P<x>\+?\(?\d[\d ().-]{{2,}}\d)"]),
    *rules(
        "ID",
        [
            rf"(?i:\b{_NUMBERED}(?:[ \t]+(?:record|account))?(?:[ \t]*{_NO})?\.?[ \t]*(?:[:#]|is|of)[ \t#]*)"
            rf"(?P<x>{_NUMBER})",
            rf"(?i:\b{_NUMBERED}[ \t]*{_NO}[ \t]*)(?P<x>{_NUMBER})",
            rf"(?i:\b(?:MRN|SSN|DEA|NPI)[ \t]+)(?P<x>{_NUMBER})",
            rf"(?i:\b{_NUMBERED}[ \t]+)(?P<x>(?=(?:[A-Za-z-]{{0,3}}\d){{5}})[\w-]+)",
            r"(?i:\b(?:card|account|number)s? (?:ending|ends)(?: in| with)? )(?P<x>\d{3,4})",
        ],
    ),
    *rules(
        "DEVICE",
        [
            rf"(?i:\b(?:serial|device|lot|model|UDI|implant|generator|lead|ref)(?:[ \t]*(?:{_NO}|s/n))*\.?[ \t]*"
            rf"(?:[:#]|number|no\.)[ \t]*)(?P<x>{_NUMBER})",
            r"(?i:\b(?:ref|lot|serial|model)[ \t]+)(?P<x>[A-Z]{0,4}-?\d{5,}[\w-]*)",
            rf"(?i:\bS/N[ \t:]*)(?P<x>{_NUMBER})",
        ],
    ),
    *rules(
        "VEHICLE",
        [
            r"(?i:\b(?:licen[cs]e plate|plate|VIN|registration)(?:[ \t]*(?:no|number|#))?\.?[ \t:#]*)"
            r"(?P<x>(?=[A-Za-z -]{0,9}\d)[A-Z0-9][A-Z0-9 -]{3,16}[A-Z0-9])"
        ],
    ),
    *rules(
        "ADDRESS",
        [
            rf"\b\d{{1,6}}[A-Za-z]?[ \t]+(?:(?:{_CAP}|[NSEW]\.?|\d+(?:st|nd|rd|th))[ \t]+){{1,4}}{_STREET}"
            r"(?:,?[ \t]*(?:Apt|Apartment|Suite|Ste|Unit|Room|Rm|#)\.?[ \t]*[\w-]+)?"
            rf"(?:,?\s+{_TOWN}(?=,|[ \t]+{_STATE}\b))?(?:,?[ \t]+{_STATE}\b)?(?:,?[ \t]+{_ZIP})?",
            r"(?i:\bP\.?O\.? box \d+)",
            rf"\b{_TOWN},[ \t]+(?:(?!MD\b){_STATE}\b(?:[ \t]+{_ZIP})?|MD[ \t]+{_ZIP})",
            rf"\b{_STATE}[ \t]+{_ZIP}",
            r"\b[A-Z]{1,2}\d[A-Z\d]?[ \t]\d[A-Z]{2}\b",
            r"(?i:\b(?:zip|postal|post)[ \t]?code)[ \t:]*(?P<x>[A-Z0-9][A-Z0-9 -]{3,8}[A-Z0-9])",
            r"(?i:\b(?:(?:home |mailing |street )?address|residence|city|town|county)[ \t]*:[ \t]*)"
            r"(?P<x>[^\n;]{3,80})",
        ],
    ),
    *rules("ADDRESS", [rf"{_LIVES}[ \t]+(?P<x>{_TOWN}(?:,[ \t]+{_TOWN})?)"], is_name),
    *rules(
        "ADDRESS",
        [rf"\b(?:in|from|to|near|outside|at)[ \t]+(?P<x>(?>{_TOWN}))(?!['’]s|[ \t]+{_EPONYM})"],
        is_place,
    ),
    *rules(
        "HOSPITAL",
        [
            r"(?i:\b(?:facility|hospital|clinic|institution)(?: name)?[ \t]*:[ \t]*)(?P<x>[A-Z][^\n,;]{2,60})",
            rf"\bHospital (?:of|for) (?:the )?{_TOWN}",
        ],
    ),
    *rules(
        "HOSPITAL",
        [
            rf"\b(?:{_CAP}(?:['’]s)?|St\.)(?:[ \t]+(?:{_CAP}(?:['’]s)?|of|the|and|&|for|St\.)){{0,5}}[ \t]+"
            rf"{_FACILITY}"
        ],
        is_name,
    ),
]
