"""Which department of a hospital a record belongs to.

Every vocabulary has its own hint: ICD-10-CM its letter and number, HPO its top-level branch, MeSH its tree, free
text its words. What gives no hint is `general medicine`.
"""

import re
from collections import Counter

GENERAL = "general medicine"

DEPARTMENTS: tuple[str, ...] = (
    "allergy and immunology",
    "cardiology",
    "dentistry",
    "dermatology",
    "emergency medicine",
    "endocrinology",
    "gastroenterology",
    GENERAL,
    "genetics",
    "hematology",
    "infectious diseases",
    "neonatology",
    "nephrology and urology",
    "neurology",
    "obstetrics and gynecology",
    "oncology",
    "ophthalmology",
    "orthopedics and rheumatology",
    "otolaryngology",
    "pharmacology",
    "psychiatry",
    "public health",
    "pulmonology",
    "radiology",
)
"""Every department a record can carry."""

# First code of each run of categories, in order: a category belongs to the last start not after it.
_ICD_STARTS: tuple[tuple[str, str], ...] = (
    ("A00", "infectious diseases"),
    ("C00", "oncology"),
    ("D50", "hematology"),
    ("D80", "allergy and immunology"),
    ("E00", "endocrinology"),
    ("F01", "psychiatry"),
    ("G00", "neurology"),
    ("H00", "ophthalmology"),
    ("H60", "otolaryngology"),
    ("I00", "cardiology"),
    ("I60", "neurology"),
    ("I70", "cardiology"),
    ("J00", "pulmonology"),
    ("J30", "otolaryngology"),
    ("J40", "pulmonology"),
    ("K00", "dentistry"),
    ("K20", "gastroenterology"),
    ("L00", "dermatology"),
    ("M00", "orthopedics and rheumatology"),
    ("N00", "nephrology and urology"),
    ("N60", "obstetrics and gynecology"),
    ("N99", "nephrology and urology"),
    ("O00", "obstetrics and gynecology"),
    ("P00", "neonatology"),
    ("Q00", "genetics"),
    ("R00", GENERAL),
    ("S00", "emergency medicine"),
    ("U00", GENERAL),
    ("V00", "public health"),
)


def of_icd(code: str) -> str:
    """Returns the department of an ICD-10-CM category code such as `J45.9`."""
    department = GENERAL
    for start, name in _ICD_STARTS:
        if code[:3] >= start:
            department = name
    return department


HPO_BRANCHES: dict[str, str] = {
    "HP:0000119": "nephrology and urology",
    "HP:0000152": "otolaryngology",
    "HP:0000478": "ophthalmology",
    "HP:0000598": "otolaryngology",
    "HP:0000707": "neurology",
    "HP:0000769": "obstetrics and gynecology",
    "HP:0000818": "endocrinology",
    "HP:0001197": "neonatology",
    "HP:0001507": "genetics",
    "HP:0001574": "dermatology",
    "HP:0001608": "otolaryngology",
    "HP:0001626": "cardiology",
    "HP:0001871": "hematology",
    "HP:0001939": "endocrinology",
    "HP:0002086": "pulmonology",
    "HP:0002664": "oncology",
    "HP:0002715": "allergy and immunology",
    "HP:0025031": "gastroenterology",
    "HP:0033127": "orthopedics and rheumatology",
    "HP:0040064": "orthopedics and rheumatology",
    "HP:0045027": "pulmonology",
}
"""Top-level branch of HPO's phenotypic abnormalities -> department. A term in several branches takes the first in
this order after the organ-specific ones; branches that are not here (growth of cells, symptoms) say nothing."""

_MESH_TREES: dict[str, str] = {
    "C01": "infectious diseases",
    "C04": "oncology",
    "C05": "orthopedics and rheumatology",
    "C06": "gastroenterology",
    "C07": "dentistry",
    "C08": "pulmonology",
    "C09": "otolaryngology",
    "C10": "neurology",
    "C11": "ophthalmology",
    "C12": "nephrology and urology",
    "C13": "obstetrics and gynecology",
    "C14": "cardiology",
    "C15": "hematology",
    "C16": "genetics",
    "C17": "dermatology",
    "C18": "endocrinology",
    "C19": "endocrinology",
    "C20": "allergy and immunology",
    "C22": "public health",
    "C24": "public health",
    "C25": "emergency medicine",
    "C26": "emergency medicine",
    "F01": "psychiatry",
    "F02": "psychiatry",
    "F03": "psychiatry",
    "F04": "psychiatry",
    "N01": "public health",
    "N06": "public health",
}


def of_mesh(tree_numbers: list[str]) -> str:
    """Returns the department of the first MeSH tree number that names one."""
    for number in tree_numbers:
        if number[:3] in _MESH_TREES:
            return _MESH_TREES[number[:3]]
    return GENERAL


# Stems as they begin a word. Order settles ties: what is more specific stands first.
_STEMS: dict[str, str] = {
    "oncology": "cancer tumor tumour carcinoma lymphoma leukemi sarcoma metasta chemotherap oncolog neoplasm",
    "cardiology": "heart cardiac cardio coronary myocard atrial arrhythm hypertens aort artery valv vascular statin",
    "neurology": "brain neuro stroke epilep seizure cerebral dementia headache migraine spinal nerve parkinson",
    "pulmonology": "lung pulmon respirat asthma bronch pneumon copd airway thoracic chest breath",
    "gastroenterology": "liver hepat stomach gastr intestin bowel colon pancrea esophag digest biliary cirrhosis",
    "nephrology and urology": "kidney renal urin nephr bladder prostat dialysis urolog",
    "endocrinology": "diabet insulin thyroid hormon endocrin adrenal metaboli glucose obes gout",
    "hematology": "blood anemi anaemi hemat haemat coagul platelet hemophil thromb hemoglobin",
    "infectious diseases": "infect virus viral bacteri antibiotic sepsis tubercul malaria hiv vaccin parasit fung",
    "dermatology": "skin dermat psoria eczema acne hair nail burn",
    "ophthalmology": "eye retina ocular vision glaucom cornea cataract",
    "otolaryngology": "ear nose throat hearing sinus larynx tonsil",
    "orthopedics and rheumatology": "bone joint fractur arthrit muscl musculoskeletal osteopor rheumat tendon",
    "psychiatry": "psychiatr depress anxiety schizophren mental bipolar alcohol addict autism",
    "obstetrics and gynecology": "pregnan uter ovar breast gynecol obstet birth menstr vagina",
    "neonatology": "neonat newborn infant perinatal pediatric",
    "dentistry": "tooth teeth dental oral gum",
    "allergy and immunology": "immun allerg autoimmun antibod",
    "genetics": "genetic gene chromosom mutation inherit hereditar congenital",
    "emergency medicine": "trauma injur poison resuscitat emergency shock",
    "public health": "epidemiolog hygiene nutrition prevalen mortality",
    "pharmacology": "drug pharmac medication dose",
    "radiology": "radiolog radiograph imaging ultrasound mri",
}
_NAMES = {f"d{number}": department for number, department in enumerate(_STEMS)}
_WORDS = re.compile(
    r"\b(?:" + "|".join(f"(?P<{key}>{'|'.join(_STEMS[name].split())})" for key, name in _NAMES.items()) + ")",
    re.IGNORECASE,
)


def of_text(text: str, at_least: int = 2) -> str:
    """Returns the department whose word stems occur most often in `text`, if at least `at_least` times."""
    counts = Counter(match.lastgroup for match in _WORDS.finditer(text))
    best = max(_NAMES, key=lambda key: counts[key])  # of equals the first, the more specific
    return _NAMES[best] if counts[best] >= at_least else GENERAL
