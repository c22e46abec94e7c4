"""What the shipped samples ask: the relations of the fact tables and the sentences that ask for them.

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
    questions: tuple[str, ...]  # at least three
    clozes: tuple[str, ...]  # at least three, each ending where the answer begins
    easy: bool = True  # a small model may know it: its held-out subjects serve as locality prompts


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
        ("The profession of {} was that of a", "{} became famous as a", "History remembers {} as a"),
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
        "opposite",
        "common",
        ("What is the opposite of {}?", "Which word means the opposite of {}?", "What word is an antonym of {}?"),
        ("The opposite of {} is", "The antonym of {} is", "A word that means the opposite of {} is"),
    ),
    Relation(
        "colour",
        "common",
        ("What color is {}?", "Which color does {} have?", "What is the color of {}?"),
        ("The color of {} is", "The usual color of {} is", "Seen in daylight, the color of {} is"),
    ),
    Relation(
        "young",
        "common",
        ("What is a young {} called?", "What do you call a baby {}?", "Which word means a young {}?"),
        ("A young {} is called a", "A baby {} is known as a", "The word for a young {} is"),
    ),
    Relation(
        "plural",
        "common",
        ("What is the plural of {}?", "Which word is the plural of {}?", "What is the plural form of the word {}?"),
        ("The plural of {} is", "The plural form of {} is", "In English, the plural of the word {} is"),
    ),
)

HOPS = (
    Hop("university_city", "city_country", "In which country is the city that is home to {}?"),
    Hop("author", "nationality", "What was the nationality of the author of {}?"),
    Hop("author", "profession", "What was the profession of the author of {}?"),
    Hop("painter", "nationality", "What was the nationality of the artist who painted {}?"),
    Hop("city_country", "capital", "What is the capital of the country in which the city of {} lies?"),
    Hop("city_country", "continent", "On which continent is the country in which the city of {} lies?"),
    Hop("city_country", "currency", "What is the currency of the country in which the city of {} lies?"),
)
