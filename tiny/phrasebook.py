"""A small phrasebook grammar: what a traveller says, in four languages at once.

Each draw picks one meaning (who, what, how many, where, when) and writes it in French, German,
Spanish and English. Agreement, case, contraction and word order are built in, so the four texts
are correct and mean the same by construction. Each French, German or Spanish sentence has exactly
one English sentence: a small model then has a translation to learn, not a choice to guess.

    python tiny/phrasebook.py           print ten French sentences to say, with their translations
"""

import argparse
import random
import re
from typing import NamedTuple

LANGS = ("fr", "de", "es", "en")


class Text(NamedTuple):
    """One piece of meaning, written in each language."""

    fr: str
    de: str
    es: str
    en: str


class Noun(NamedTuple):
    one: Text
    many: Text
    gender: Text


class Row(NamedTuple):
    weight: float
    pattern: str
    de: str = ""
    es: str = ""
    en: str = ""


# Columns: one, many ("-" where no sentence needs it), gender.
NOUN_ROWS = """
English           French               German                      Spanish
coffee   coffees  café      cafés   m  Kaffee      Kaffees      m  café       cafés      m
beer     beers    bière     bières  f  Bier        Bier         n  cerveza    cervezas   f
soup     soups    soupe     soupes  f  Suppe       Suppen       f  sopa       sopas      f
salad    salads   salade    salades f  Salat       Salate       m  ensalada   ensaladas  f
wine     -        vin       -       m  Wein        -            m  vino       -          m
fish     -        poisson   -       m  Fisch       -            m  pescado    -          m
apple    apples   pomme     pommes  f  Apfel       Äpfel        m  manzana    manzanas   f
tomato   tomatoes tomate    tomates f  Tomate      Tomaten      f  tomate     tomates    m
flower   flowers  fleur     fleurs  f  Blume       Blumen       f  flor       flores     f
ticket   tickets  billet    billets m  Fahrkarte   Fahrkarten   f  billete    billetes   m
room     -        chambre   -       f  Zimmer      -            n  habitación -          f
table    -        table     -       f  Tisch       -            m  mesa       -          f
train    -        train     -       m  Zug         -            m  tren       -          m
bus      -        bus       -       m  Bus         -            m  autobús    -          m
station  -        gare      -       f  Bahnhof     -            m  estación   -          f
hotel    -        hôtel     -       m  Hotel       -            n  hotel      -          m
bank     -        banque    -       f  Bank        -            f  banco      -          m
museum   -        musée     -       m  Museum      -            n  museo      -          m
church   -        église    -       f  Kirche      -            f  iglesia    -          f
market   -        marché    -       m  Markt       -            m  mercado    -          m
bridge   -        pont      -       m  Brücke      -            f  puente     -          m
restaurant -      restaurant -      m  Restaurant  -            n  restaurante -         m
"""

# Columns: English, French m and f, German, Spanish m and f, the Spanish "is" it goes with.
ADJECTIVE_ROWS = """
hot        chaud  chaude   heiß   caliente caliente  está
cold       froid  froide   kalt   frío     fría      está
expensive  cher   chère    teuer  caro     cara      es
small      petit  petite   klein  pequeño  pequeña   es
big        grand  grande   groß   grande   grande    es
old        vieux  vieille  alt    viejo    vieja     es
"""

# fmt: off
# Patterns name these pieces by their left column.
WORDS = {
    "sister":    Text("ma sœur",     "meine Schwester", "mi hermana", "my sister"),
    "brother":   Text("mon frère",   "mein Bruder",     "mi hermano", "my brother"),
    "daughter":  Text("ma fille",    "meine Tochter",   "mi hija",    "my daughter"),
    "friend":    Text("mon ami",     "mein Freund",     "mi amigo",   "my friend"),
    "Paris":     Text("Paris",       "Paris",           "París",      "Paris"),
    "Berlin":    Text("Berlin",      "Berlin",          "Berlín",     "Berlin"),
    "Madrid":    Text("Madrid",      "Madrid",          "Madrid",     "Madrid"),
    "Rome":      Text("Rome",        "Rom",             "Roma",       "Rome"),
    "London":    Text("Londres",     "London",          "Londres",    "London"),
    "today":     Text("aujourd'hui", "heute",           "hoy",        "today"),
    "tomorrow":  Text("demain",      "morgen",          "mañana",     "tomorrow"),
    "Monday":    Text("lundi",       "am Montag",       "el lunes",   "on Monday"),
    "Thursday":  Text("jeudi",       "am Donnerstag",   "el jueves",  "on Thursday"),
    "Saturday":  Text("samedi",      "am Samstag",      "el sábado",  "on Saturday"),
    "Sunday":    Text("dimanche",    "am Sonntag",      "el domingo", "on Sunday"),
    "left":      Text("à gauche",    "links",           "a la izquierda", "left"),
    "right":     Text("à droite",    "rechts",          "a la derecha",   "right"),
    "very":      Text("très",        "sehr",            "muy",        "very"),
    "too":       Text("trop",        "zu",              "demasiado",  "too"),
    "heat":      Text("chaud",       "heiß",            "calor",      "hot"),
    "chill":     Text("froid",       "kalt",            "frío",       "cold"),
    "much":      Text("très",        "sehr",            "mucho",      "very"),
    "and":       Text("et",          "und",             "y",          "and"),
    "for":       Text("pour",        "für",             "para",       "for"),
    "in":        Text("à",           "in",              "en",         "in"),
    "to":        Text("pour",        "nach",            "a",          "to"),
    "from":      Text("de",          "aus",             "de",         "from"),
    "visiting":  Text("à",           "nach",            "a",          "to"),
    "reaching":  Text("à",           "in",              "a",          "in"),
    "euros":     Text("euros",       "Euro",            "euros",      "euros"),
    "people":    Text("personnes",   "Personen",        "personas",   "people"),
    "nights":    Text("nuits",       "Nächte",          "noches",     "nights"),
    "nothing":   Text("", "", "", ""),
    "please":    Text(", s'il vous plaît", ", bitte", ", por favor", ", please"),
    "I_want":    Text("je voudrais", "ich möchte", "quisiera", "I would like"),
    "wants":     Text("voudrait", "möchte", "quisiera", "would like"),
    "have_you":  Text("vous avez", "haben Sie", "tiene", "do you have"),
    "where_is":  Text("où est", "wo ist", "dónde está", "where is"),
    "how_much":  Text("combien coûte", "wie viel kostet", "cuánto cuesta", "how much is"),
    "what_time": Text("à quelle heure", "um wie viel Uhr", "a qué hora", "what time"),
    "costs":     Text("coûte", "kostet", "cuesta", "costs"),
    "buys":      Text("achète", "kauft", "está comprando", "is buying"),
    "likes":     Text("aime", "mag", "le gusta", "likes"),
    "dislikes":  Text("n'aime pas", "mag", "no le gusta", "does not like"),
    "is":        Text("est", "ist", "está", "is"),
    "waits":     Text("attend", "wartet", "está esperando", "is waiting for"),
    "we_wait":   Text("nous attendons", "wir warten", "estamos esperando", "we are waiting for"),
    "walks":     Text("va", "geht", "va", "is going"),
    "rides":     Text("va", "fährt", "va", "is going"),
    "we_walk":   Text("nous allons", "wir gehen", "vamos", "we are going"),
    "we_ride":   Text("nous allons", "wir fahren", "vamos", "we are going"),
    "leaves":    Text("part", "fährt", "sale", "leaves"),
    "arrives":   Text("arrive", "kommt", "llega", "arrives"),
    "opens":     Text("ouvre", "öffnet", "abre", "opens"),
    "closes":    Text("ferme", "schließt", "cierra", "closes"),
    "turn":      Text("tournez", "biegen Sie", "gire", "turn"),
    "go":        Text("allez", "gehen Sie", "siga", "go"),
    "straight":  Text("tout droit", "geradeaus", "todo recto", "straight ahead"),
    "it_is":     Text("il fait", "ist es", "hace", "it is"),
    "rains":     Text("il va pleuvoir", "wird es", "va a llover", "it will rain"),
    "stays_dry": Text("il ne va pas pleuvoir", "wird es", "no va a llover", "it will not rain"),
}
# Only German needs twelve: half past eleven is "halb zwölf".
NUMBERS = [Text(*row) for row in zip(
    "un deux trois quatre cinq six sept huit neuf dix onze douze".split(),
    "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split(),
    "uno dos tres cuatro cinco seis siete ocho nueve diez once doce".split(),
    "one two three four five six seven eight nine ten eleven twelve".split(),
)]
# Words before a place; at, of, to and up to need more than a dative in German.
PREPOSITIONS = {
    "front":    Text("devant",     "vor",       "delante de",  "in front of"),
    "behind":   Text("derrière",   "hinter",    "detrás de",   "behind"),
    "next":     Text("à côté de",  "neben",     "al lado de",  "next to"),
    "opposite": Text("en face de", "gegenüber", "enfrente de", "opposite"),
    "after":    Text("après",      "nach",      "después de",  "after"),
    "at":       Text("à",          "",          "en",          "at"),
    "of":       Text("de",         "",          "de",          "at"),
    "to":       Text("à",          "",          "a",           "to"),
    "up_to":    Text("jusqu'à",    "",          "hasta",       "to"),
}
GERMAN_AT = {
    "station": "am Bahnhof", "hotel": "im Hotel", "bank": "in der Bank", "museum": "im Museum",
    "church": "in der Kirche", "market": "auf dem Markt", "restaurant": "im Restaurant",
}
GERMAN_TO = {"museum": "ins Museum", "restaurant": "ins Restaurant"}
# fmt: on
GENDERS = ("m", "f", "n")


def read_nouns(rows: str) -> dict[str, Noun]:
    nouns = {}
    for row in rows.strip().splitlines()[1:]:
        en, en_many, fr, fr_many, fr_sex, de, de_many, de_sex, es, es_many, es_sex = row.split()
        many = Text(fr_many, de_many, es_many, en_many)
        nouns[en] = Noun(Text(fr, de, es, en), many, Text(fr_sex, de_sex, es_sex, ""))
    return nouns


NOUNS = read_nouns(NOUN_ROWS)
ADJECTIVES = {row.split()[0]: row.split() for row in ADJECTIVE_ROWS.strip().splitlines()}


def pick(table: dict, names: str) -> list:
    return [table[name] for name in names.split()]


NOTHING = WORDS["nothing"]
PEOPLE = pick(WORDS, "sister brother daughter friend")
CITIES = pick(WORDS, "Paris Berlin Madrid Rome London")
WHEN = pick(WORDS, "today tomorrow Monday Thursday Saturday Sunday")
DEGREES = pick(WORDS, "nothing very too")
FOOD = pick(NOUNS, "coffee beer soup salad wine fish")
ORDERS, GOODS = FOOD[:4], pick(NOUNS, "apple tomato flower")
KITCHENS = pick(NOUNS, "hotel market restaurant")
OPENING = pick(NOUNS, "bank museum market restaurant church")
INDOORS = pick(NOUNS, "station hotel bank museum church market restaurant")
PLACES = [*INDOORS, NOUNS["bridge"]]


def chain(*pieces: Text) -> Text:
    return Text(*(" ".join(part for part in parts if part) for parts in zip(*pieces)))


def with_article(before: Text, noun: Noun) -> Text:
    """The noun after these words: French and Spanish contract, German comes ready."""
    french = " l'" if noun.one.fr[0] in "éh" else {"m": " le ", "f": " la "}[noun.gender.fr]
    french = (before.fr + french).replace("de le ", "du ").replace("à le ", "au ") + noun.one.fr
    spanish = before.es + {"m": " el ", "f": " la "}[noun.gender.es] + noun.one.es
    spanish = re.sub(r"\b(de|a) el ", r"\1l ", spanish)
    english = f"{before.en} the {noun.one.en}"
    return Text(french.strip(), before.de, spanish.strip(), english.strip())


def the(noun: Noun, case: str = "subject") -> Text:
    articles = {"subject": "der die das", "object": "den die das", "dative": "dem der dem"}
    article = articles[case].split()[GENDERS.index(noun.gender.de)]
    return with_article(NOTHING._replace(de=f"{article} {noun.one.de}"), noun)


def near(word: str, place: Noun) -> Text:
    """A place after a preposition: "en face du pont", "gegenüber der Brücke"."""
    english, dative = place.one.en, the(place, "dative").de
    german = f"{PREPOSITIONS[word].de} {dative}"
    # "Zu" melts into the article: "zum Markt", "zur Bank".
    toward = f"zu{dative[2:]}"
    special = {"at": GERMAN_AT, "of": GERMAN_AT, "to": GERMAN_TO}.get(word, {})
    if word in ("to", "up_to"):
        german = toward if word == "to" else f"bis {toward}"
    return with_article(PREPOSITIONS[word]._replace(de=special.get(english, german)), place)


def counted(number: int, noun: Noun) -> Text:
    """A number of things as the object of the sentence: "einen Kaffee", "zwei Suppen"."""
    if number > 1:
        return chain(NUMBERS[number - 1], noun.many)
    fr, de, es = (GENDERS.index(gender) for gender in noun.gender[:3])
    one = Text(("un", "une")[fr], ("einen", "eine", "ein")[de], ("un", "una")[es], "a")
    return chain(one, noun.one)


def quality(noun: Noun, degree: Text, *adjectives: str) -> Text:
    """What is said of a thing: "est très petite et vieille"."""
    agreeing, copula = [], ""
    for adjective in adjectives:
        en, fr_m, fr_f, de, es_m, es_f, copula = ADJECTIVES[adjective]
        french = fr_m if noun.gender.fr == "m" else fr_f
        spanish = es_m if noun.gender.es == "m" else es_f
        agreeing += [WORDS["and"], Text(french, de, spanish, en)]
    return chain(WORDS["is"]._replace(es=copula), degree, *agreeing[1:])


def clock(rng: random.Random) -> Text:
    hour = rng.randrange(11)
    (fr, de, es, en), after = NUMBERS[hour], NUMBERS[hour + 1].de
    fr, es = ("à une heure", "a la una") if hour == 0 else (f"à {fr} heures", f"a las {es}")
    times = [
        Text(fr, f"um {de.replace('eins', 'ein')} Uhr", es, f"at {en} o'clock"),
        Text(f"{fr} et quart", f"um Viertel nach {de}", f"{es} y cuarto", f"at quarter past {en}"),
        Text(f"{fr} et demie", f"um halb {after}", f"{es} y media", f"at half past {en}"),
    ]
    return rng.choice(times)


def several(rng: random.Random, things: list[Noun], low: int, high: int) -> Text:
    """A number of one thing, or of two things."""
    one, other = (counted(rng.randint(low, high), thing) for thing in rng.sample(things, 2))
    single = counted(rng.randint(low, 10), rng.choice(things))
    return rng.choices([single, chain(one, WORDS["and"], other)], [2, 3])[0]


def around(rng: random.Random, place: Noun) -> Text:
    return near(rng.choice(["front", "behind", "next", "opposite"]), place)


def spot(rng: random.Random) -> Text:
    at = near("at", rng.choice(INDOORS))
    return rng.choices([at, around(rng, rng.choice(PLACES))], [2, 3])[0]


def liked(rng: random.Random) -> Text:
    # Only dishes of a place: "aimer le vin" can mean "to like wine" and "to like the wine". No
    # coffee: "le café de l'hôtel" can be a room or a drink.
    dish = chain(the(rng.choice(FOOD[1:]), "object"), near("of", rng.choice(KITCHENS)))
    place = the(rng.choice(PLACES), "object")
    return rng.choices([rng.choice(CITIES), place, dish], [2, 3, 5])[0]


def places(rng: random.Random) -> dict[str, Text]:
    place, other = rng.sample(PLACES, 2)
    return {"place": the(place), "there": around(rng, other)}


def meeting(rng: random.Random) -> dict[str, Text]:
    who, other = rng.sample(PEOPLE, 2)
    # German changes "mein" to "meinen", Spanish puts "a" before a person.
    other = other._replace(de=re.sub("^mein ", "meinen ", other.de), es=f"a {other.es}")
    waiter = rng.choices([chain(who, WORDS["waits"]), WORDS["we_wait"]], [3, 1])[0]
    return {"waiter": waiter, "other": other}


def dish(rng: random.Random) -> dict[str, Text]:
    noun = rng.choice(FOOD)
    what, warm = the(noun), noun in pick(NOUNS, "coffee soup fish")
    adjective = rng.choice(["hot", "cold", "expensive"] if warm else ["cold", "expensive"])
    if noun.one.en != "coffee" and rng.random() < 0.5:
        what = chain(what, near("of", rng.choice(KITCHENS)))
    return {"what": what, "how": quality(noun, rng.choice(DEGREES), adjective)}


def building(rng: random.Random) -> dict[str, Text]:
    noun, other = rng.sample(PLACES, 2)
    first, second = rng.choice(["small", "big"]), "old"
    if noun in pick(NOUNS, "hotel museum market restaurant"):
        second = rng.choice(["old", "expensive"])
    degree, what = rng.choice(DEGREES), the(noun)
    if degree.en != "too" and rng.random() < 0.5:
        return {"what": what, "how": quality(noun, degree, first, second)}
    what = chain(what, rng.choice([around(rng, other), NOTHING]))
    return {"what": what, "how": quality(noun, degree, rng.choice([first, second]))}


# fmt: off
SCENES = {scene.__name__: scene for scene in (places, meeting, dish, building)}
DRAWS = {
    "who":       lambda rng: rng.choice(PEOPLE),
    "asker":     lambda rng: rng.choice([WORDS["I_want"],
                                         chain(rng.choice(PEOPLE), WORDS["wants"])]),
    "waiter":    lambda rng: rng.choice([WORDS["we_wait"],
                                         chain(rng.choice(PEOPLE), WORDS["waits"])]),
    "town":      lambda rng: rng.choice(CITIES),
    "please?":   lambda rng: rng.choice(pick(WORDS, "please nothing")),
    "day":       lambda rng: rng.choice(WHEN),
    "day?":      lambda rng: rng.choice([*WHEN, NOTHING, NOTHING]),
    "today?":    lambda rng: rng.choice(pick(WORDS, "today nothing")),
    # A ticket is for the day itself: "für Montag", not "für am Montag".
    "date":      lambda rng: rng.choice([day._replace(de=day.de.removeprefix("am "),
                                         en=day.en.removeprefix("on ")) for day in WHEN]),
    "time":      clock,
    "time?":     lambda rng: rng.choice([clock(rng), NOTHING]),
    "degree":    lambda rng: rng.choice(pick(WORDS, "nothing much too")),
    "weather":   lambda rng: rng.choice(pick(WORDS, "heat chill")),
    "side":      lambda rng: rng.choice(pick(WORDS, "left right")),
    "number":    lambda rng: rng.choice(NUMBERS[1:8]),
    "price":     lambda rng: rng.choice(NUMBERS[1:11]),
    "meal":      lambda rng: several(rng, ORDERS, 1, 5),
    "goods":     lambda rng: several(rng, GOODS, 2, 10),
    "tickets":   lambda rng: counted(rng.randint(1, 9), NOUNS["ticket"]),
    "a_room":    lambda rng: counted(1, NOUNS["room"]),
    "a_table":   lambda rng: counted(1, NOUNS["table"]),
    "ticket":    lambda rng: the(NOUNS["ticket"]),
    "train":     lambda rng: the(NOUNS["train"], "object"),
    "bus":       lambda rng: the(NOUNS["bus"], "object"),
    "vehicle":   lambda rng: the(rng.choice(pick(NOUNS, "train bus"))),
    "food":      lambda rng: the(rng.choice(FOOD)),
    "house":     lambda rng: the(rng.choice(OPENING)),
    "the_place": lambda rng: the(rng.choice(PLACES)),
    "to_place":  lambda rng: near("to", rng.choice(PLACES)),
    "up_to":     lambda rng: near("up_to", rng.choice(PLACES)),
    "past":      lambda rng: near(rng.choice(["after", "front", "behind"]), rng.choice(PLACES)),
    "around":    lambda rng: around(rng, rng.choice(PLACES)),
    "spot":      spot,
    "kitchen":   lambda rng: near("at", rng.choice(KITCHENS)),
    "market":    lambda rng: near("at", NOUNS["market"]),
    "station":   lambda rng: near("at", NOUNS["station"]),
    "liked":     liked,
}
# A pattern names pieces in order; de, es and en give a language an order of its own. A name before
# a colon is a scene, which draws pieces that depend on each other. Any other word is written
# unchanged.
TEMPLATES = [
    Row(10, "asker meal please?"),
    Row(3, "asker tickets to town please?"),
    Row(5, "asker tickets to town for date please?"),
    Row(3, "asker a_room for number people and price nights please?"),
    Row(3, "have_you a_room for number people and price nights ?"),
    Row(6, "have_you a_table for number people day time? ?",
        "have_you day time? a_table for number people"),
    Row(6, "who buys goods market", "who buys market goods"),
    Row(3, "who buys tickets to town station", "who buys station tickets to town"),
    Row(4, "food costs price euros kitchen", "food costs kitchen price euros"),
    Row(2, "ticket to town costs price euros"),
    Row(1, "how_much food kitchen ?"),
    Row(.5, "how_much ticket to town ?"),
    Row(4, "who likes liked", es="a who likes liked"),
    Row(4, "who dislikes liked", "who dislikes liked nicht", es="a who dislikes liked"),
    Row(5, "places: place is there"),
    Row(5, "who is spot today?", "who is today? spot"),
    Row(1, "who is in town today?", "who is today? in town"),
    Row(1, "where_is the_place please? ?"),
    Row(1, "where_is vehicle to town please? ?"),
    Row(1, "where_is vehicle from town please? ?"),
    Row(.5, "where_is who today? ?"),
    Row(3, "turn side past", "turn past side ab"),
    Row(2, "turn side and go straight up_to", "turn side ab and go straight up_to"),
    Row(2, "go straight up_to and turn side", "go straight up_to and turn side ab"),
    Row(5, "vehicle to town leaves day? time", "vehicle to town leaves day? time ab"),
    Row(5, "vehicle from town arrives day? time", "vehicle from town arrives day? time an"),
    Row(5, "who arrives reaching town day? time", "who arrives day? time reaching town an"),
    Row(4, "house opens day? time"),
    Row(4, "house closes day? time"),
    Row(2, "what_time leaves vehicle to town day? ?", "what_time leaves vehicle to town day? ab",
        en="what_time does vehicle to town leave day?"),
    Row(2, "what_time arrives vehicle from town day? ?",
        "what_time arrives vehicle from town day? an",
        en="what_time does vehicle from town arrive day?"),
    Row(1.5, "what_time opens house day? ?", en="what_time does house open day?"),
    Row(1.5, "what_time closes house day? ?", en="what_time does house close day?"),
    Row(4, "it_is degree weather in town today?", "in town it_is today? degree weather",
        es="today? it_is degree weather in town"),
    Row(2, "rains in town day", "in town rains day regnen", es="day rains in town"),
    Row(2, "stays_dry in town day", "in town stays_dry day nicht regnen",
        es="day stays_dry in town"),
    Row(7, "dish: what how"),
    Row(7, "building: what how"),
    Row(4, "meeting: waiter other spot", "waiter spot auf other"),
    Row(3, "waiter bus around", "waiter around auf bus"),
    Row(1.4, "waiter train to town station", "waiter station auf train to town"),
    Row(3, "who walks to_place day time?", "who walks day time? to_place"),
    Row(1.5, "who rides visiting town day time?", "who rides day time? visiting town"),
    # "Vamos a ..." is also "let us go": with the day in front it can only be a statement.
    Row(3, "we_walk to_place day time?", "we_walk day time? to_place",
        es="day time? we_walk to_place"),
    Row(1.5, "we_ride visiting town day time?", "we_ride day time? visiting town",
        es="day time? we_ride visiting town"),
]
# Repeated pieces are drawn more often.
PHRASES = """
food, the_place, the_place, vehicle, meal, meal, tickets, tickets, goods, who, day, day, time, time,
time, day time, day time, around, around, around, past, up_to, in town, vehicle to town,
vehicle from town, for number people, price nights, price euros
""".replace("\n", " ").strip().split(", ")
# fmt: on


def fill(rng: random.Random, template: Row) -> dict[str, str]:
    scene, _, pattern = template.pattern.rpartition(": ")
    pieces = WORDS | (SCENES[scene](rng) if scene else {})
    for name in pattern.split():
        if name not in pieces:
            pieces[name] = DRAWS[name](rng)
    written = {}
    for lang in LANGS:
        names = (getattr(template, lang, "") or pattern).split()
        parts = [getattr(pieces[name], lang) if name in pieces else name for name in names]
        written[lang] = " ".join(part for part in parts if part).replace(" ,", ",")
    return written


def sentence(rng: random.Random) -> dict[str, str]:
    """A whole sentence. French sets a space before "?", Spanish also opens the question."""
    template = rng.choices(TEMPLATES, [row.weight for row in TEMPLATES])[0]
    frames = dict.fromkeys(LANGS, "{}.")
    if template.pattern.endswith(" ?"):
        frames = dict.fromkeys(LANGS, "{}?") | {"fr": "{} ?", "es": "¿{}?"}
    written = fill(rng, template._replace(pattern=template.pattern.removesuffix(" ?")))
    return {lang: frames[lang].format(text[0].upper() + text[1:]) for lang, text in written.items()}


def phrase(rng: random.Random) -> dict[str, str]:
    """A short piece, so that words can be learned before whole sentences."""
    return fill(rng, Row(1, rng.choice(PHRASES)))


def words(lang: str) -> set[str]:
    rng = random.Random(0)
    return {word for _ in range(20000) for word in re.findall(r"\w+", sentence(rng)[lang].lower())}


def main():
    """Print ten sentences of a language, and after each one its English translation."""
    parser = argparse.ArgumentParser(description="Print ten sentences and their translations.")
    add = parser.add_argument
    add("--lang", choices=("fr", "de", "es"), default="fr", help="language of the sentences [fr]")
    add("--seed", help="the same seed prints the same sentences [new ones in every run]")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(10):
        texts = sentence(rng)
        print(f"{texts[args.lang]}\n    {texts['en']}")


if __name__ == "__main__":
    main()
