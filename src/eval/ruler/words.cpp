// Lists of common words, and sentences with gaps for them.
#include "eval/ruler/words.h"

#include <array>

namespace narrows {

namespace {

constexpr std::string_view kNouns[] = {
    "harbour", "kettle",   "meadow",  "lantern", "ladder",   "orchard",  "pebble",  "saddle",   "teapot",
    "window",  "anchor",   "basket",  "candle",  "desert",   "engine",   "feather", "garden",   "hammer",
    "island",  "jacket",   "kitchen", "letter",  "market",   "needle",   "office",  "pencil",   "quarry",
    "ribbon",  "shovel",   "tunnel",  "valley",  "wagon",    "yard",     "barrel",  "bridge",   "button",
    "canal",   "castle",   "chapel",  "cherry",  "circle",   "cliff",    "clock",   "cloud",    "coin",
    "compass", "copper",   "corner",  "cotton",  "cradle",   "crystal",  "curtain", "dagger",   "diamond",
    "dinner",  "doctor",   "dragon",  "drawer",  "eagle",    "elbow",    "ember",   "falcon",   "farmer",
    "ferry",   "fiddle",   "flute",   "forest",  "fossil",   "fountain", "fox",     "galaxy",   "glacier",
    "glove",   "goblet",   "grain",   "guitar",  "hallway",  "helmet",   "hermit",  "hilltop",  "honey",
    "horizon", "hotel",    "iceberg", "insect",  "iron",     "ivory",    "jewel",   "journal",  "jungle",
    "kennel",  "kingdom",  "knight",  "lagoon",  "lemon",    "library",  "lizard",  "magnet",   "mantle",
    "marble",  "mirror",   "monkey",  "morning", "mountain", "museum",   "nephew",  "notebook", "oak",
    "oven",    "oyster",   "paddle",  "palace",  "parcel",   "parrot",   "pasture", "pepper",   "pillow",
    "pilot",   "planet",   "plaza",   "pocket",  "pond",     "powder",   "prairie", "prison",   "pulley",
    "pumpkin", "puppet",   "rabbit",  "radio",   "railway",  "raven",    "recipe",  "reef",     "river",
    "rocket",  "rope",     "sailor",  "salmon",  "sandal",   "saucer",   "school",  "scissors", "shadow",
    "shelf",   "shepherd", "signal",  "silver",  "sister",   "sketch",   "spider",  "spoon",    "stable",
    "stadium", "station",  "storm",   "street",  "sugar",    "summit",   "sunset",  "table",    "tailor",
    "temple",  "thistle",  "thunder", "ticket",  "tiger",    "timber",   "tower",   "trumpet",  "turtle",
    "uncle",   "vessel",   "village", "violin",  "volcano",  "walnut",   "water",   "weaver",   "whistle",
    "widow",   "willow",   "winter",  "wizard",  "workshop", "yoghurt",  "zebra",   "zipper",   "acorn",
    "attic"};

constexpr std::string_view kAdjectives[] = {
    "quiet",   "golden",  "narrow", "bitter",   "clever",  "dusty",   "eager",    "faint",   "gentle",
    "hollow",  "idle",    "jolly",  "keen",     "lonely",  "mellow",  "noisy",    "orange",  "plain",
    "rapid",   "silent",  "tender", "urban",    "vivid",   "wooden",  "yellow",   "ancient", "brave",
    "calm",    "damp",    "early",  "fancy",    "grand",   "humble",  "icy",      "kind",    "lucky",
    "modern",  "neat",    "old",    "polite",   "quick",   "rough",   "shy",      "tall",    "useful",
    "warm",    "young",   "bright", "crooked",  "distant", "elegant", "fierce",   "grey",    "hungry",
    "jagged",  "light",   "muddy",  "nimble",   "odd",     "patient", "proud",    "rare",    "sleepy",
    "thick",   "upright", "velvet", "wild",     "amber",   "broken",  "cheerful", "deep",    "empty",
    "famous",  "green",   "heavy",  "innocent", "lazy",    "merry",   "northern", "pale",    "purple",
    "round",   "steep",   "tidy",   "violet",   "weary",   "blue",    "cold",     "dry",     "electric",
    "foreign", "giant",   "harsh",  "large",    "minor",   "open",    "pure",     "red",     "smooth",
    "southern"};

constexpr std::string_view kVerbs[] = {"followed", "admired",  "carried",   "noticed",  "painted",
                                       "measured", "repaired", "described", "borrowed", "preferred",
                                       "crossed",  "studied",  "watched",   "gathered", "protected",
                                       "replaced", "moved",    "remembered"};

constexpr std::string_view kPeople[] = {"a neighbour",   "the teacher", "my cousin",   "the captain",
                                        "an old friend", "the baker",   "a traveller", "the gardener",
                                        "her brother",   "the editor"};

constexpr std::string_view kTimes[] = {"in the spring",      "after the rain",    "before noon",
                                       "on most evenings",   "when it was late",  "for several weeks",
                                       "once a year",        "without any hurry", "at the usual hour",
                                       "while others slept", "by the river",      "behind the house"};

constexpr std::string_view kThoughts[] = {"Nobody asked why",       "It seemed reasonable",
                                          "That was not unusual",   "Some people doubt it",
                                          "There is little to add", "It took longer than planned",
                                          "The result was modest",  "Most of us would agree"};

template <size_t N>
std::string one_of(const std::string_view (&list)[N], RulerRandom& random) {
  return std::string(list[random.below(N)]);
}

/// "a golden lantern".
std::string thing(RulerRandom& random) {
  const std::string adjective = one_of(kAdjectives, random);
  const bool vowel = std::string_view("aeiou").find(adjective[0]) != std::string_view::npos;
  return (vowel ? "an " : "a ") + adjective + " " + one_of(kNouns, random);
}

std::string capital(std::string text) {
  text[0] = static_cast<char>(text[0] - 'a' + 'A');
  return text;
}

constexpr int kTries = 20;

}  // namespace

std::span<const std::string_view> plain_nouns() { return kNouns; }
std::span<const std::string_view> plain_adjectives() { return kAdjectives; }

std::string NewKeys::next(RulerRandom& random) {
  for (int tries = 0;; ++tries) {
    std::string key = one_of(kAdjectives, random) + "-" + one_of(kNouns, random);
    for (int more = 0; more < tries / kTries; ++more) key += "-" + one_of(kNouns, random);
    if (given_.insert(key).second) return key;
  }
}

NewWords::NewWords(RulerRandom& random) {
  for (const std::string_view word : kNouns) plain_.emplace_back(word);
  for (const std::string_view word : kAdjectives) plain_.emplace_back(word);
  random.shuffle(plain_);
}

std::string NewWords::next(RulerRandom& random) {
  if (!plain_.empty()) {
    std::string word = std::move(plain_.back());
    plain_.pop_back();
    return word;
  }
  for (int tries = 0;; ++tries) {
    std::string word = one_of(kNouns, random) + one_of(kNouns, random);
    for (int more = 0; more < tries / kTries; ++more) word += one_of(kNouns, random);
    if (given_.insert(word).second) return word;
  }
}

std::string random_digits(RulerRandom& random, int n) {
  std::string digits;
  for (int i = 0; i < n; ++i)
    digits += static_cast<char>(i == 0 ? '1' + random.below(9) : '0' + random.below(10));
  return digits;
}

std::string random_uuid(RulerRandom& random) {
  std::string id;
  for (const int n : {8, 4, 4, 4, 12}) {
    if (!id.empty()) id += '-';
    for (int i = 0; i < n; ++i) id += "0123456789abcdef"[random.below(16)];
  }
  return id;
}

std::string random_letters(RulerRandom& random, int n, char a) {
  std::string letters;
  for (int i = 0; i < n; ++i) letters += static_cast<char>(static_cast<uint64_t>(a) + random.below(26));
  return letters;
}

std::string essay_sentence(RulerRandom& random) {
  switch (random.below(6)) {
    case 0:
      return capital(one_of(kPeople, random)) + " " + one_of(kVerbs, random) + " " + thing(random) + " " +
             one_of(kTimes, random) + ". ";
    case 1:
      return one_of(kThoughts, random) + ", although " + thing(random) + " is not the same as " +
             thing(random) + ". ";
    case 2:
      return "There was " + thing(random) + " near the " + one_of(kNouns, random) + ", and " +
             one_of(kPeople, random) + " " + one_of(kVerbs, random) + " it " + one_of(kTimes, random) + ". ";
    case 3:
      return "Whoever has " + one_of(kVerbs, random) + " " + thing(random) + " knows that the " +
             one_of(kNouns, random) + " comes first and the " + one_of(kNouns, random) + " later. ";
    case 4:
      return one_of(kThoughts, random) + ". ";
    default:
      return "In one such " + one_of(kNouns, random) + " we saw " + thing(random) + ", " + thing(random) +
             " and sometimes " + thing(random) + " " + one_of(kTimes, random) + ". ";
  }
}

std::string_view noise_sentences() {
  return "The kettle is warm. The road is long. The lamp is lit. On we walk. Home again and out once more. ";
}

}  // namespace narrows
