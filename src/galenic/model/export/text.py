"""A small text of our own to measure quantising on where none is given: general, medical, Chinese, arithmetic."""

TEXT = (
    "Fever is a rise of the body temperature above its daily range. It is caused by substances that move the set "
    "point of the hypothalamus upwards, most often in the course of an infection. A child with fever drinks more, "
    "sleeps more and eats less; what matters is how it looks, not the number on the thermometer.",
    "The lungs lie in the chest on both sides of the heart. Air reaches them through the windpipe, which divides into "
    "two main bronchi and then, again and again, into smaller ones. Oxygen passes through the thin walls of the "
    "alveoli into the blood, and carbon dioxide comes out of it.",
    "High blood pressure rarely causes complaints for many years. It is found by measuring it, and it is treated by "
    "losing weight, by eating less salt, by moving more, and by drugs such as ACE inhibitors, calcium channel blockers "
    "and diuretics. The risk of stroke falls with the pressure.",
    "Type 1 diabetes begins when the cells of the pancreas that make insulin have been destroyed. Thirst, frequent "
    "urination and weight loss are its first signs. Type 2 diabetes begins with a weak response to insulin, and is "
    "often treated with metformin first.",
    "The town lies on a river between low hills. In the morning the market fills with people who buy bread, cheese and "
    "vegetables, and by noon the square is empty again. The road to the coast was built two hundred years ago.",
    "A function that is called with the same arguments should give the same result. If it reads a file, the file is "
    "one of its arguments; if it needs the time of day, that is one too. Tests of such functions are short.",
    "There are 12 eggs in a box. Anna buys 3 boxes and uses 8 eggs for a cake, so she has 36 - 8 = 28 eggs left. If "
    "she gives a quarter of them to her neighbour, the neighbour has 7 eggs and she has 21.",
    "An infarction of the heart is the death of a part of its muscle because a coronary artery is closed, mostly by a "
    "clot on a torn plaque. Pain behind the breastbone that reaches into the left arm, sweat and fear are typical, but "
    "older people and people with diabetes may feel little.",
    "发热是体温高于正常范围的表现，常见于感染。儿童发热时应多饮水、注意休息，并观察精神状态。若持续高热或出现抽搐，应及时就医。",
    "高血压早期多无症状，长期升高可损害心、脑、肾等器官。低盐饮食、控制体重、规律运动和按时服药可以降低中风的风险。",
    "春天来了，河边的柳树长出了新叶，孩子们在草地上放风筝。老人坐在树下下棋，一直到太阳落山才回家。",
    "Rare diseases are rare one by one, but there are thousands of them. Most have a genetic cause, and many begin "
    "in childhood. Patients often wait for years until their disease has a name, because no doctor has seen two cases.",
)
"""Documents, written for this file."""
