"""Made-up clinical notes for `deidentification.py`: templates and what fills them."""
# ruff: noqa: E501 (a template is one line)

import random
import re

COMMON = "James Mary Robert Patricia Michael Linda David Susan Karen Thomas|Smith Johnson Brown Davis Wilson Moore Taylor Clark Lewis Young"
UNCOMMON = (
    "Oluwaseun Priyanka Xiomara Thorbjørn Nguyet Aleksandra Kwabena Yesenia Dimitrios Siobhan Rashid Mei-Ling Tariq Ingeborg Jedediah"
    "|Adeyemi Venkataraman Quispe Haraldsen Tran Wojciechowska O'Sullivan Okonkwo Papadopoulos MacGregor Al-Masri Ferreira Zhou Lindqvist Pettigrew"
)
GIVEN = "伟 秀英 建国 丽华 子涵 志强 雨桐 淑珍 国栋 欣怡 小红 浩然 晓东 桂兰 思远 明 芳 磊 佳慧 永福"
SURNAMES = "王 李 张 刘 陈 杨 赵 黄 周 吴 徐 孙 胡 朱 高 林 何 郭 马 罗 于 白 温 方 欧阳 上官 司马 戚 缪 单"
CITIES = "Worcester,Duluth,Tulsa,Chattanooga,Eugene,Fargo,Asheville,Bakersfield,Peoria,Santa Rosa".split(",")
STREETS = "Elm Street,Washington Avenue,Old Mill Road,N. Lincoln Blvd,Sunset Drive,Pine Hollow Ln,5th Avenue,Maple Court".split(
    ","
)
HOSPITALS = (
    "St. Mary's Hospital,Riverside Medical Center,Cedar Valley Clinic,Good Samaritan Hospital,Mercy Health Center,Oak Hill Nursing Home,"
    "Hospital of the Holy Cross,UCHealth"
).split(",")
HAN_PLACES = (
    "北京市海淀区中关村大街27号院3号楼402室 广东省深圳市南山区科技园路8号 湖北省武汉市洪山区珞喻路1037号 四川省凉山彝族自治州昭觉县竹核乡木渣洛村2组 上海市徐汇区漕溪北路595弄12号 "
    "青岛市市南区香港中路61号 南通市如皋市白蒲镇 安徽省阜阳市临泉县"
).split()
HAN_HOSPITALS = "北京协和医院 武汉同济医院 四川大学华西医院 中山大学附属第三医院 如皋市人民医院 上海长海医院 白蒲镇中心卫生院 惠民社区卫生服务中心".split()

ENGLISH = {
    "form": [
        "DISCHARGE SUMMARY\nPatient Name: {NAME:caps}\nMRN: {ID:mrn}\nDOB: {DATE:num}\nAdmitted: {DATE:num}   Discharged: {DATE:num}\nAttending: {NAME:dr}\nPCP: {NAME:full}, MD\n"
        "Diagnosis: community-acquired pneumonia, right lower lobe. History of Graves disease and Parkinson disease.\nPlan: amoxicillin 500 mg three times daily for 7 days. Call {PHONE} with questions.\n"
        "Electronically signed by: {NAME:full} on {DATE:iso}",
        "RADIOLOGY REPORT\nName: {NAME:full}  Acct #: {ID:mrn}  SSN: {ID:ssn}\nExam date: {DATE:num}\nReferring physician: {NAME:full}\nFacility: {HOSPITAL}\n"
        "Findings: No focal consolidation. Heart size 12 x 8 cm. Foley catheter in place. Glasgow Coma Scale 15.\nImpression: Normal chest. Compared with {DATE:month}.",
        "FACE SHEET\nPatient: {NAME:full}\nAddress: {ADDRESS:street}\nPhone: {PHONE}\nFax: {PHONE}\nEmail: {EMAIL}\nInsurance ID: {ID:policy}\nEmergency contact: {NAME:full} (daughter)\nDriver's license: {ID:policy}\n"
        "Pacemaker serial number: {DEVICE}\nLicense plate: {VEHICLE}\nPortal: {URL}\nLast login from {IP}",
    ],
    "narrative": [
        "{NAME:full} is a {AGE}-year-old woman who was brought from {HOSPITAL} after a fall on {DATE:month}. She lives alone in {ADDRESS:city}. Her daughter {NAME:first} noticed confusion. "
        "Blood pressure 142/88, temperature 38.1, strength 4/5 in the left arm. Dr. {NAME:last} from Neurology was consulted and recommended MRI. Will follow up with {NAME:dr} on {DATE:short}.",
        "Mr. {NAME:last} returned to clinic today. He was last seen on {DATE:num} by {NAME:full}, NP. He reports that his wife, {NAME:first}, manages his pills. "
        "Troponin 0.04, platelets 250000, creatinine 1.2. Hodgkin lymphoma in remission since {DATE:month}. Spoke with {NAME:full} at {PHONE}; she will fax records from {HOSPITAL}.",
        "Pt seen and examined. Case discussed with {NAME:full1} and family. Ms {NAME:last2}, now {AGE}, tolerated the Whipple procedure on {DATE:short} well. Transferred from {ADDRESS:city} by ambulance. "
        "No known drug allergies. Babinski sign absent. JVP 8 cm. {NAME:last2}, formerly a teacher in {ADDRESS:city}, wishes to go home to {ADDRESS:street}.",
        "Thank you for referring {NAME:full1}, whom I saw on {DATE:long}. As you know, {NAME:first1} has had Crohn disease since childhood, and mother {NAME:full} has type 2 diabetes. "
        "Colonoscopy at {HOSPITAL} in {DATE:month} showed ulcers. I have asked {NAME:full} to see her. Sincerely, {NAME:full}, MD",
        "nursing note: pt {NAME:lower1} c/o pain 7/10, given morphine 2 mg iv. dr {NAME:lower} notified at 0430. daughter called from {PHONE}. room 412 bed b. mrs {NAME:lower1} asleep. next dose due {DATE:short}.",
    ],
    "letters": [
        "ED TRIAGE {DATE:num} 14:35. {AGE} yo F BIBA from {ADDRESS:street}, found down by neighbor {NAME:full1}. Per EMS GCS 13. {NAME:first1} last saw her {DATE:month}. Pmhx afib on apixaban, COPD. "
        "Family en route from {ADDRESS:city}. Old chart {ID:mrn} requested from {HOSPITAL}. Trauma team ({NAME:last}, {NAME:last}) at bedside. Son can be reached at {PHONE}.",
        "PSYCHOTHERAPY PROGRESS NOTE\nI met {NAME:full1} together with the social worker, {NAME:full}. {NAME:first1} described conflict at work; the supervisor, a Mr {NAME:last}, had moved {NAME:first1} to the {ADDRESS:city} branch in {DATE:month}. "
        "Sleep is poor. Beck Depression Inventory 22. {NAME:first1} will email {EMAIL} before the next session, {DATE:short}.",
        "OPERATIVE NOTE. Date of operation {DATE:long}. Surgeon {NAME:last}. First assistant {NAME:last}. Implant: hip stem, ref {DEVICE}. The patient was positioned in the Trendelenburg position and a Kocher incision was made. "
        "Blood loss 250 ml. Specimen {ID:policy} to pathology. {NAME:last} was present for the key portions. Dictated {DATE:num}, {NAME:last}/{NAME:last}.",
        "From: {NAME:full1} <{EMAIL}>\nSubject: results\nHi {NAME:first}, could you look at {NAME:full}'s potassium? It was 6.1 on {DATE:short}. I am on {PHONE} until five. Account {ID:policy}, card ending 4411.\nThanks, {NAME:first1}",
        "Home visit. Mrs {NAME:last1} now stays with her niece in {ADDRESS:city} because the house at {ADDRESS:street} was flooded. {NAME:last1} was at {HOSPITAL} between {DATE:num} and {DATE:num} for heart failure. "
        "Wound over the left heel 3 x 2 cm. {NAME:full} will take over from {DATE:month}. Reviewed with Drs {NAME:last} and {NAME:last}.",
    ],
    "unseen": [
        "Telephone encounter {DATE:num}: mother of {NAME:full1} phoned, {PHONE}. {NAME:first1} has had fever since {DATE:short}. Advised fluids. Pharmacy: Walgreens on {ADDRESS:street}. Reviewed later with {NAME:full}.",
        "{HOSPITAL} Rehabilitation note. {NAME:last1} walked 30 m with a frame today; Berg Balance Scale 41. {NAME:full} (PT) and {NAME:full} (OT) agree that {NAME:last1} can go back to {ADDRESS:city} around {DATE:month}. File {ID:mrn}.",
        "I, {NAME:full1}, consent to the procedure. Signed in the presence of {NAME:full} at {HOSPITAL}, {DATE:long}. {NAME:full1}, {ADDRESS:street}. ID card {ID:policy}.",
        "Oncology MDT, {DATE:num}. Cases: 1) {NAME:last}, {AGE} y, T2N1 adenocarcinoma, Gleason 7, for radiotherapy. 2) {NAME:last}, referred by the {ADDRESS:city} team, MRI pending. Present: {NAME:full}, {NAME:full}, {NAME:full}.",
        "Hx obtained from granddaughter {NAME:first}. Pt worked in a mill in {ADDRESS:city} until {DATE:month}, never smoked. Mantoux 12 mm. Sputum sent, lab no. {ID:mrn}. {NAME:full} from public health informed, will trace contacts at {ADDRESS:street}.",
    ],
}
CHINESE = {
    "form": [
        "出院记录\n姓名：{NAME:zh}  性别：男  年龄：{AGE:zh}\n住院号：{ID:zhmrn}  身份证号：{ID:resident}\n入院日期：{DATE:zh}  出院日期：{DATE:zh}\n家庭住址：{ADDRESS:zh}\n联系电话：{PHONE:zh}\n"
        "诊断：2型糖尿病，高血压病3级。出院医嘱：二甲双胍0.5g口服，每日3次。\n主治医师：{NAME:zh}  记录者：{NAME:zh}",
        "检查报告单\n姓名：{NAME:zh}  性别：女  科室：心内科  检查号：{ID:zhmrn}\n医院：{HOSPITAL:zh}\n检查所见：双肺纹理清晰，心影不大，心胸比0.48。\n诊断意见：未见明显异常。\n报告医生：{NAME:zh}  审核医生：{NAME:zh}  报告日期：{DATE:iso}",
        "知情同意书\n患者姓名：{NAME:zh}\n医保卡号：{ID:zhmrn}\n工作单位：{ADDRESS:zh}\n联系人：{NAME:zh}（女儿）手机：{PHONE:zh}\n电子邮箱：{EMAIL}\n起搏器序列号：{DEVICE}\n车牌：{VEHICLE:zh}\n家属签字：{NAME:zh}  {DATE:zh}",
    ],
    "narrative": [
        "患者{NAME:zh}，男，{AGE:zh}，因“反复咳嗽、咳痰3年，加重1周”于{DATE:zh}入院。患者高热，最高39.2℃，伴黄疸。{DATE:zhshort}曾在{HOSPITAL:zh}就诊，予头孢曲松2.0g静滴。家住{ADDRESS:zh}，其女儿{NAME:zh}陪同。",
        "{DATE:zhshort}查房：{NAME:zhlast}主任查房后指示：继续抗感染治疗，白细胞12.3×10^9/L，血压130/80mmHg。{NAME:zh}医师已与家属{NAME:zh}沟通病情，家属表示理解。必要时请{NAME:zh}会诊。",
        "今接到{HOSPITAL:zh}电话，{NAME:zh}的病理结果为腺癌。患者自{DATE:zh}起无明显诱因出现腹痛，曾于外院就诊。联系电话{PHONE:zh}。既往体健，否认肝炎史，来自{ADDRESS:zh}。",
        "{NAME:zh}，女，{AGE:zh}，退休教师，{DATE:zhhan}因跌倒致左髋部疼痛，由儿子{NAME:zh}送至{HOSPITAL:zh}。马上行CT检查，左股骨颈骨折。何时手术待定，高血压病史20年。",
        "老{NAME:zhlast}说自己昨晚没睡好，女儿小{NAME:zhfirst}很担心。住在{ADDRESS:zh}，平时由邻居{NAME:zh}照看。查体：神清，腹软，无压痛。",
    ],
    "letters": [
        "急诊留观记录 {DATE:iso} 患者{NAME:zh}，{AGE:zh}，女，由120从{ADDRESS:zh}接来。随车家属为其侄子{NAME:zh}，电话{PHONE:zh}。GCS 13分，房颤病史10年。已联系{HOSPITAL:zh}调阅病历（{ID:zhmrn}）。{NAME:zh}到场查看病人。",
        "护理记录：{DATE:zhshort}夜班，{NAME:zh}床旁交接。病人{NAME:zh}夜间睡眠差，予地西泮5mg口服。{NAME:zhlast}护师通知{NAME:zhlast}医生，遵医嘱吸氧2L/min。下次换药{DATE:zhshort}。",
        "门诊随访：{NAME:zh}自{DATE:zh}出院后按时服药，血糖6.8mmol/L。本人目前在{ADDRESS:zh}打工，换手机号{PHONE:zh}，邮箱{EMAIL}。下次找{NAME:zh}教授复诊，也可到{HOSPITAL:zh}就近取药。",
        "手术记录  手术日期{DATE:zh}  术者{NAME:zh}  一助{NAME:zh}  洗手护士{NAME:zh}\n麻醉成功后取仰卧位，沿原切口进入，出血约150ml。标本编号{ID:zhmrn}，植入物序列号{DEVICE}。术后由{NAME:zh}送返病房，告知家属{NAME:zh}手术经过。",
        "转诊信：{HOSPITAL:zh}心内科同道，兹介绍我院病人{NAME:zh}（身份证{ID:resident}）前来就诊。该患{DATE:zhshort}突发胸痛，其兄{NAME:zh}诉家族中有类似病史。烦请{NAME:zhlast}老师接诊，谢谢！{NAME:zh} 敬上",
    ],
    "unseen": [
        "电话随访{DATE:iso}：患者母亲来电（{PHONE:zh}），称{NAME:zh}{DATE:zhshort}起发热，嘱多饮水。事后与{NAME:zh}、{NAME:zh}两位医师讨论，建议到{HOSPITAL:zh}复查。",
        "康复记录。{NAME:zh}今日扶助行器行走30米，Berg评分41分。治疗师{NAME:zh}认为可于{DATE:zh}回{ADDRESS:zh}休养。档案编号{ID:zhmrn}。",
        "本人{NAME:zh}自愿接受手术，见证人{NAME:zh}。{DATE:zh}于{HOSPITAL:zh}。证件号码{ID:resident}，住{ADDRESS:zh}。",
        "多学科讨论：1、{NAME:zh}，{AGE:zh}，胃腺癌T2N1，拟行放疗；2、{NAME:zh}，由{HOSPITAL:zh}转来，MRI待回报。参加人员：{NAME:zh}、{NAME:zh}、{NAME:zh}。",
        "病史由其孙{NAME:zh}提供。患者{DATE:zh}前在{ADDRESS:zh}纺织厂工作，不吸烟。痰标本已送，编号{ID:zhmrn}。疾控人员{NAME:zh}已知悉，将追踪密切接触者，{NAME:zhlast}科长负责。",
    ],
}


def person(rng: random.Random) -> tuple[str, str]:
    firsts, lasts = (part.split() for part in rng.choice([COMMON, UNCOMMON]).split("|"))
    return rng.choice(firsts), rng.choice(lasts)


def fill(category: str, form: str, rng: random.Random, people: dict[str, tuple[str, str]]) -> str:
    """One identifier; the forms are those that notes use. A digit behind a form is a person met again."""
    pick, number = rng.choice, lambda digits: "".join(rng.choice("0123456789") for _ in range(digits))
    first, last = person(rng)
    if form[-1:].isdigit():
        (first, last), form = people.setdefault(form[-1], (first, last)), form[:-1]
    year, month, day = rng.randint(1998, 2024), rng.randint(1, 12), rng.randint(1, 28)
    name = "January February March April May June July August September October November December".split()[
        month - 1
    ]
    surname, given = pick(SURNAMES.split()), pick(GIVEN.split())
    if category == "NAME":
        return {
            "full": pick([f"{first} {last}", f"{first} {pick('ABCDEJKLM')}. {last}"]),
            "caps": pick([f"{last.upper()}, {first.upper()}", f"{last}, {first}"]),
            "dr": f"Dr. {pick([first + ' ' + last, last])}".removeprefix("Dr. ") if rng.random() < 0.3 else f"Dr. {last}".removeprefix("Dr. "),
            "last": last, "first": first, "lower": last.lower(), "zh": surname + given, "zhlast": surname, "zhfirst": given,
        }[form]  # fmt: skip
    if category == "DATE":
        return {
            "num": pick([f"{month:02d}/{day:02d}/{year}", f"{month}/{day}/{year % 100:02d}", f"{month}-{day}-{year}"]),
            "iso": f"{year}-{month:02d}-{day:02d}", "month": pick([f"{name} {year}", f"{name} {day}, {year}", f"{name[:3]} {day}"]),
            "long": pick([f"{day} {name} {year}", f"{name} {day}, {year}", f"{day}th of {name}"]), "short": pick([f"{month}/{day}", f"{name} {day}", f"{day}-{name[:3]}-{year}"]),
            "zh": pick([f"{year}年{month}月{day}日", f"{year}-{month:02d}-{day:02d}", f"{year}.{month:02d}.{day:02d}", f"{year}年{month}月"]),
            "zhshort": pick([f"{month}月{day}日", f"{year}年{month}月{day}日", f"{month}-{day}"]), "zhhan": pick(["二〇二三年三月五日", "二零一九年十二月二十八日", "农历正月初五"]),
        }[form]  # fmt: skip
    if category == "ID":
        base = (
            f"{pick(['110105', '420111', '510107'])}{rng.randint(1930, 2005)}{month:02d}{day:02d}{number(3)}"
        )
        check = "10X98765432"[
            sum(
                w * int(d)
                for w, d in zip((7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2), base, strict=True)
            )
            % 11
        ]
        return {"mrn": pick([number(7), number(8), f"H{number(6)}", f"{number(3)}-{number(2)}-{number(2)}"]), "ssn": f"{number(3)}-{number(2)}-{number(4)}",
                "policy": pick([f"XK{number(9)}", f"W{number(8)}", f"{number(4)}{pick('ABC')}{number(5)}"]), "zhmrn": pick([number(8), number(10), f"ZY{number(7)}"]), "resident": base + check}[form]  # fmt: skip
    mobile = f"1{pick('35789')}{number(9)}"
    return {
        "AGE": str(rng.randint(90, 102)) + ("岁" if form == "zh" else ""),
        "PHONE": pick([mobile, f"{mobile[:3]}-{mobile[3:7]}-{mobile[7:]}", f"0{pick(['10', '21', '755'])}-{number(8)}"]) if form == "zh"
        else pick([f"({number(3)}) 555-{number(4)}", f"{number(3)}-555-{number(4)}", f"{number(3)}.555.{number(4)}", f"+44 20 7946 {number(4)}"]),
        "EMAIL": f"{first.lower()}.{number(2)}@{pick(['example.org', 'mail.example.com'])}".replace("ø", "o"),
        "ADDRESS": pick(HAN_PLACES) if form == "zh" else pick(CITIES) if form == "city"
        else pick([f"{rng.randint(1, 9999)} {pick(STREETS)}", f"{rng.randint(1, 999)} {pick(STREETS)}, {pick(CITIES)}, {pick(['MA', 'OR', 'TX'])} {number(5)}"]),
        "HOSPITAL": pick(HAN_HOSPITALS) if form == "zh" else pick(HOSPITALS),
        "DEVICE": f"{pick('PSL')}{pick('ABC')}{number(7)}", "VEHICLE": f"{pick('京沪粤川')}{pick('ABC')}{number(5)}" if form == "zh" else f"{pick('ABCD')}{pick('KLM')}{pick('XYZ')}-{number(4)}",
        "URL": f"https://portal.example.org/u/{number(6)}", "IP": f"{rng.randint(11, 220)}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.{rng.randint(1, 254)}",
    }[category]  # fmt: skip


def note(template: str, rng: random.Random) -> tuple[str, list[tuple[int, int, str]]]:
    """A filled template and where its identifiers are."""
    text, spans, last, people = "", [], 0, {}
    for match in re.finditer(r"\{([A-Z]+)(?::(\w+))?\}", template):
        text += template[last : match.start()]
        value = fill(match.group(1), match.group(2) or "", rng, people)
        spans.append((len(text), len(text) + len(value), match.group(1)))
        text, last = text + value, match.end()
    return text + template[last:], spans
