"""What the shipped samples ask: the relations of the fact tables and the sentences that ask for them.

`RELATIONS` are about the world, and edits overwrite them; `COMMON` is never edited and serves locality questions.

A relation is a column of a table in `facts/`. `{}` stands for the subject. Questions and clozes of a relation all ask
for the same thing, so any two of them are paraphrases; a cloze completed with an answer and a full stop is a claim.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """A column of a fact table and how to ask for it."""

    name: str  # the column
    table: str  # the file in facts/, without .csv
    questions: tuple[str, ...]  # at least three; two where nothing is edited
    clozes: tuple[str, ...]  # at least three, each ending where the answer begins; one where nothing is edited
    easy: bool = True  # a small model may know it: its held-out subjects serve as known facts


@dataclass(frozen=True, slots=True)
class Hop:
    """A two-step question: the answer to `first` about `{}` is the subject of `second`, whose answer is asked for."""

    first: str
    second: str
    question: str


RELATIONS = (
    Relation(
        "capital",
        "countries",
        ("What is the capital of {}?", "Which city is the capital of {}?", "What city does {} have as its capital?"),
        ("The capital of {} is", "The capital city of {} is", "{} has its capital in the city of"),
    ),
    Relation(
        "continent",
        "countries",
        ("On which continent is {}?", "Which continent is {} part of?", "What continent would you find {} on?"),
        ("The continent that {} belongs to is", "{} is a country on the continent of", "On a globe, {} is part of"),
    ),
    Relation(
        "currency",
        "countries",
        ("What is the currency of {}?", "Which money is used in {}?", "What currency do shops in {} take?"),
        ("The currency of {} is the", "In {}, people pay with the", "The money used in {} is the"),
    ),
    Relation(
        "official_language",
        "countries",
        (
            "Which language is official in {}?",
            "What is an official language of {}?",
            "What language does the government of {} use officially?",
        ),
        (
            "An official language of {} is",
            "In {}, the law is published in",
            "The government of {} does its official business in",
        ),
    ),
    Relation(
        "demonym",
        "countries",
        (
            "What are people from {} called?",
            "What do you call the people of {}?",
            "By what name are citizens of {} known?",
        ),
        ("People from {} are called", "Citizens of {} are known as", "The inhabitants of {} are known as"),
    ),
    Relation(
        "internet_domain",
        "countries",
        (
            "What is the internet country code of {}?",
            "Which top-level domain belongs to {}?",
            "What do web addresses from {} end in?",
        ),
        (
            "The internet country code of {} is",
            "Web addresses from {} end in",
            "The top-level domain that belongs to {} is",
        ),
        easy=False,
    ),
    Relation(
        "calling_code",
        "countries",
        (
            "What is the telephone country code of {}?",
            "Which code do you dial to call {} from abroad?",
            "What prefix do international phone numbers in {} have?",
        ),
        (
            "The telephone country code of {} is",
            "To call {} from abroad you dial",
            "International phone numbers in {} begin with",
        ),
        easy=False,
    ),
    Relation(
        "symbol",
        "elements",
        (
            "What is the chemical symbol of {}?",
            "Which symbol stands for {} in the periodic table?",
            "How do chemists abbreviate the element {}?",
        ),
        (
            "The chemical symbol of {} is",
            "In the periodic table, the element {} has the symbol",
            "Chemists write the element {} as",
        ),
    ),
    Relation(
        "atomic_number",
        "elements",
        (
            "What is the atomic number of {}?",
            "How many protons does an atom of {} have?",
            "At which number does {} stand in the periodic table?",
        ),
        (
            "The atomic number of {} is",
            "The number of protons in an atom of {} is",
            "In the periodic table, {} is element number",
        ),
    ),
    Relation(
        "state_capital",
        "states",
        (
            "What is the capital of the US state of {}?",
            "Which city is the state capital of {}?",
            "In which city does the legislature of the state of {} meet?",
        ),
        (
            "The capital of the US state of {} is",
            "The state capital of {} is",
            "The legislature of the state of {} meets in",
        ),
    ),
    Relation(
        "abbreviation",
        "states",
        (
            "What is the postal abbreviation of the US state of {}?",
            "Which two letters stand for the state of {} in an address?",
            "How do American letters abbreviate the state of {}?",
        ),
        (
            "The postal abbreviation of the US state of {} is",
            "In an address, the state of {} is written as",
            "The two letters that stand for the state of {} are",
        ),
    ),
    Relation(
        "nickname",
        "states",
        (
            "What is the nickname of the US state of {}?",
            "By which nickname is the state of {} known?",
            "What do Americans like to call the state of {}?",
        ),
        (
            "The nickname of the US state of {} is the",
            "Americans know the state of {} as the",
            "The US state of {} calls itself the",
        ),
    ),
    Relation(
        "city_country",
        "cities",
        ("In which country is the city of {}?", "Which country is {} a city of?", "What country does {} lie in?"),
        ("The city of {} is in", "The country in which the city of {} lies is", "{} is a city in"),
    ),
    Relation(
        "university_city",
        "universities",
        ("In which city is {}?", "Where would a student of {} live?", "What city is home to {}?"),
        ("The city where you find {} is", "The main campus of {} is in", "Students of {} live in the city of"),
    ),
    Relation(
        "author",
        "books",
        ("Who wrote {}?", "Who is the author of {}?", "From whose pen does {} come?"),
        ("The author of {} is", "The writer who gave us {} is", "The well-known work {} was written by"),
    ),
    Relation(
        "nationality",
        "people",
        (
            "What was the nationality of {}?",
            "What nationality did {} have?",
            "How would you describe {} by nationality?",
        ),
        ("The nationality of {} was", "By nationality, {} was", "In terms of nationality, {} is described as"),
    ),
    Relation(
        "profession",
        "people",
        ("What was the profession of {}?", "As what did {} become famous?", "What work is {} remembered for doing?"),
        ("The profession of {} was", "The job that made {} famous was that of", "Books list {} under the profession"),
    ),
    Relation(
        "painter",
        "paintings",
        ("Who painted {}?", "Which artist painted {}?", "By whom was the picture {} painted?"),
        ("The artist who painted {} is", "The painter of {} was", "The famous picture {} was painted by"),
    ),
    Relation(
        "composer",
        "compositions",
        ("Who composed {}?", "Which composer wrote the music of {}?", "By whom was {} composed?"),
        ("The composer of {} is", "The music of {} was written by", "The person who composed {} was"),
    ),
    Relation(
        "museum_city",
        "museums",
        ("In which city is {}?", "Where would you travel to visit {}?", "Which city has {} among its sights?"),
        ("To visit {}, travel to the city of", "The city that has {} is", "Visitors find {} in"),
    ),
    Relation(
        "airport_city",
        "airports",
        ("Which city does {} serve?", "Travelers who land at {} are near which city?", "What city uses {}?"),
        ("The city that {} serves is", "Planes that land at {} bring people to", "Passengers use {} to fly to"),
    ),
    Relation(
        "mouth",
        "rivers",
        (
            "Into which body of water does {} flow?",
            "Where does {} end?",
            "Which sea or ocean receives the water of {}?",
        ),
        ("The water of {} ends up in the", "At its mouth, {} flows into the", "A boat drifting down {} arrives at the"),
    ),
    Relation(
        "river_continent",
        "rivers",
        (
            "On which continent does {} flow?",
            "Which continent does {} cross?",
            "What continent has {} as one of its rivers?",
        ),
        (
            "The continent on which {} flows is",
            "A journey along {} is a journey through",
            "Of all continents, {} flows in",
        ),
    ),
    Relation(
        "mountain_country",
        "mountains",
        ("In which country does {} rise?", "Which country do climbers of {} go to?", "What country has the peak {}?"),
        ("The country in which {} rises is", "Climbers who want to reach {} travel to", "The peak {} stands in"),
    ),
    Relation(
        "mountain_range",
        "mountains",
        ("Which mountain range is {} part of?", "To which mountains does {} belong?", "What range has {} as a summit?"),
        (
            "The mountain range that {} is part of is the",
            "The summit of {} belongs to the",
            "Geographers count {} among the",
        ),
    ),
    Relation(
        "island_country",
        "islands",
        (
            "Which country does the island of {} belong to?",
            "What country owns the island {}?",
            "Of which country is the island {} a part?",
        ),
        (
            "The island of {} belongs to",
            "The country that the island {} is part of is",
            "People on the island of {} live in",
        ),
    ),
    Relation(
        "language_family",
        "languages",
        (
            "To which family of languages does {} belong?",
            "What kind of language is {}?",
            "How do linguists classify the {} language?",
        ),
        ("The family of languages that {} belongs to is", "Linguists classify {} as", "By descent, the {} language is"),
    ),
    Relation(
        "script",
        "languages",
        (
            "In which script is {} written?",
            "Which alphabet or script do writers of {} use?",
            "What writing system does the {} language have?",
        ),
        (
            "The script in which {} is written is called",
            "Books in the {} language are printed in a script called",
            "The name of the writing system of {} is",
        ),
    ),
    Relation(
        "year",
        "events",
        ("In which year did {}?", "When did {}?", "Can you name the year: when did {}?"),
        (
            'The year that answers the question "When did {}?" is',
            'Asked "In which year did {}?", a historian says',
            'A quiz card reads "When did {}?" and the back of the card says',
        ),
    ),
    Relation(
        "company_country",
        "companies",
        (
            "Which country does the company {} come from?",
            "What is the home country of the firm {}?",
            "Which country's industry does {} belong to?",
        ),
        ("The home country of the company {} is", "The firm {} comes from", "Business papers list {} as a firm from"),
    ),
    Relation(
        "founder",
        "companies",
        ("Who founded the company {}?", "Who started the firm {}?", "Which founder does {} go back to?"),
        ("The founder of the company {} is", "The firm {} was started by", "The person behind the start of {} is"),
    ),
    Relation(
        "animal_class",
        "animals",
        (
            "What kind of animal is the {}?",
            "To which group of animals does the {} belong?",
            "How do zoologists classify the {}?",
        ),
        ("The {} is a kind of", "Zoologists count the {} as a type of", "In the animal kingdom, the {} is a sort of"),
    ),
    Relation(
        "instrument_family",
        "instruments",
        (
            "To which family of musical instruments does the {} belong?",
            "What type of instrument is the {}?",
            "In which section would a music shop put the {}?",
        ),
        (
            "The family of instruments that the {} belongs to is",
            "By type, the {} is classed as",
            "A music shop puts the {} in the section labeled",
        ),
    ),
    Relation(
        "dish_country",
        "dishes",
        (
            "Which country is the home of {}?",
            "What country gave the world {}?",
            "To whose national cooking does {} belong?",
        ),
        ("The country that gave the world {} is", "The home of {} is", "For {} as grandmother made it, travel to"),
    ),
    Relation(
        "mythology",
        "gods",
        ("To which mythology does {} belong?", "In whose myths does {} appear?", "What mythology tells of {}?"),
        (
            "The mythology that {} belongs to is",
            "The myths that tell of {} are",
            "Among mythologies, {} belongs to the one called",
        ),
    ),
    Relation(
        "landmark_city",
        "landmarks",
        ("In which city would you see {}?", "Which city is home to {}?", "What city do tourists visit for {}?"),
        ("The city where tourists see {} is", "A postcard that shows {} comes from", "To stand before {}, go to"),
    ),
    Relation(
        "inventor",
        "inventions",
        ("Who invented {}?", "Which inventor gave us {}?", "To whom do we owe {}?"),
        ("The inventor of {} was", "The person who came up with {} was", "The world owes {} to"),
    ),
    Relation(
        "players",
        "sports",
        (
            "How many players does a side have in {}?",
            "How many people play at once for a team in {}?",
            "What is the number of players a side in {}?",
        ),
        (
            "The number of players a side in {} is",
            "In {}, the number of people who play at once for a team is",
            "The count of players that a team in {} starts with is",
        ),
    ),
    Relation(
        "place",
        "planets",
        (
            "Counted from the Sun, which place does the planet {} have?",
            "Which number in the order of the planets is {}?",
            "What is the place of the planet {} in the solar system?",
        ),
        (
            "Counted from the Sun, the planet {} is the",
            "In the order of the planets, {} is the",
            "In the solar system, the planet {} is the",
        ),
    ),
)

# What every speaker of English knows. No file edits these, and no sentence here shares three words in a row with one
# above: a locality question is to resemble no edit.
COMMON = (
    Relation(
        "opposite",
        "adjectives",
        ("Which word means the opposite of {}?", "The reverse of {} is which word?"),
        ("The opposite of {} is",),
    ),
    Relation(
        "comparative",
        "adjectives",
        ("In one word, what is more {}?", "Which one word says more {}?"),
        ("Instead of more {}, one says",),
    ),
    Relation(
        "adverb",
        "adjectives",
        ("Which adverb comes from {}?", "Turn {} into an adverb: which word is it?"),
        ("As an adverb, {} turns into",),
    ),
    Relation(
        "past_tense",
        "verbs",
        ("Today I {}, but yesterday I did what?", "Which past tense does the verb {} have?"),
        ("The past tense of the verb {} is",),
    ),
    Relation(
        "plural",
        "nouns",
        ("One {}, but two what?", "Which plural does the noun {} have?"),
        ("When there are two, the word {} turns into",),
    ),
    Relation(
        "female",
        "nouns",
        ("Which word is the female form of {}?", "The male is called {}, and the female what?"),
        ("The female form of {} is",),
    ),
    Relation(
        "next_number",
        "numbers",
        ("Counting up, which number follows {}?", "After {} comes which number?"),
        ("Counting up, the number after {} is",),
    ),
    Relation(
        "ordinal",
        "numbers",
        ("Which ordinal goes with {}?", "In a race, number {} finishes in which place?"),
        ("Of ordinals, the one for {} is",),
    ),
    Relation("result", "sums", ("How much is {}?", "Can you work out {}?"), ("In arithmetic, {} makes",)),
    Relation(
        "next_letter",
        "letters",
        ("In the alphabet, which letter follows {}?", "Which letter comes right after {}?"),
        ("In the alphabet, the letter right after {} is",),
    ),
    Relation(
        "next_time",
        "calendar",
        ("On a calendar, what follows {}?", "When {} is over, what comes next?"),
        ("On a calendar, right after {} comes",),
    ),
    Relation(
        "young",
        "beasts",
        ("Which name do we give to a baby {}?", "A baby {} goes by which name?"),
        ("The word for a baby {} is",),
    ),
    Relation(
        "sound",
        "beasts",
        ("Which noise does the {} make?", "What does the {} say?"),
        ("In print, the noise of the {} becomes",),
    ),
    Relation(
        "colour",
        "things",
        ("What color is {}?", "Which crayon would draw {}?"),
        ("The color children expect on {} is",),
    ),
    Relation(
        "organ",
        "actions",
        ("Which part of your body do you use to {}?", "Which part of the body helps you to {}?"),
        ("The part of the body you use to {} is the",),
    ),
)

HOPS = (
    Hop("university_city", "city_country", "In which country is the city that is home to {}?"),
    Hop("museum_city", "city_country", "In which country is the city where visitors find {}?"),
    Hop("airport_city", "city_country", "In which country is the city that {} serves?"),
    Hop("landmark_city", "city_country", "In which country is the city where tourists see {}?"),
    Hop("mountain_country", "capital", "What is the capital of the country in which {} rises?"),
    Hop("island_country", "capital", "What is the capital of the country that the island of {} belongs to?"),
    Hop("company_country", "capital", "What is the capital of the home country of the company {}?"),
    Hop("dish_country", "continent", "On which continent is the country that gave the world {}?"),
    Hop("dish_country", "capital", "What is the capital of the country that gave the world {}?"),
    Hop("official_language", "language_family", "To which family does the official language of {} belong?"),
    Hop("official_language", "script", "In which script is the official language of {} written?"),
    Hop("inventor", "nationality", "What was the nationality of the inventor of {}?"),
    Hop("author", "nationality", "What was the nationality of the author of {}?"),
    Hop("author", "profession", "What was the profession of the author of {}?"),
    Hop("painter", "nationality", "What was the nationality of the artist who painted {}?"),
    Hop("city_country", "capital", "What is the capital of the country in which the city of {} lies?"),
    Hop("city_country", "continent", "On which continent is the country in which the city of {} lies?"),
    Hop("city_country", "currency", "What is the currency of the country in which the city of {} lies?"),
)
