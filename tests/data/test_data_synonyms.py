import collections
import itertools
import math

import pytest
from scipy import stats

from annotations import unchecked_annotations
from gen_jax.data.config import TranslationConfig
from gen_jax.data.synonyms import Synonyms

SMALL = [
    Synonyms(words=5, min_words=1, max_words=3),
    Synonyms(words=4, min_words=2, max_words=4, orders=1),
    Synonyms(words=4, min_words=1, max_words=2, styles=1, double=0.5),
    Synonyms(words=6, min_words=2, max_words=3, styled=0.2, double=0.8, seed=7),
    Synonyms(words=4, min_words=1, max_words=4, orders=1, styles=1),
]


def sources_of(task):
    """Every source with its probability."""
    sizes = range(task.min_words, task.max_words + 1)
    for size in sizes:
        for words in itertools.permutations([f"s{i}" for i in range(task.words)], size):
            yield " ".join(words), 1 / len(sizes) / math.perm(task.words, size)


def joint_of(task, source):
    """The distribution of the targets, from what its tokens are named after."""
    meaning = collections.defaultdict(dict)
    for token in task.tokens:
        meaning[token[1:]][token[0]] = token
    joint = collections.Counter()
    for style, order in itertools.product(range(task.styles), range(task.orders)):
        words = [meaning[word[1:]] for word in source.split()]
        if order:
            words.reverse()
        tokens = []
        for word in words:
            if "f" in word:
                tokens.append(word["fi"[style]])
            else:
                tokens += [word[name] for name in "tu" if name in word]
        joint[" ".join(tokens)] += 1 / task.styles / task.orders
    return joint


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p)


@pytest.mark.parametrize("task", SMALL)
def test_the_modes_are_those_of_the_two_coins(task):
    for source, _ in sources_of(task):
        joint = joint_of(task, source)
        modes = task.modes(source)
        assert dict(modes) == pytest.approx(dict(joint))
        assert len(modes) == len(joint)
        assert len({len(target.split()) for target, _ in modes}) == 1
        for target, probability in joint.items():
            assert task.log_prob(source, target) == pytest.approx(math.log(probability))
        assert task.log_prob(source, "t0 t0") == -math.inf


@pytest.mark.parametrize("task", SMALL)
def test_the_conditional_entropy_is_the_mean_over_all_sources(task):
    assert sum(p for _, p in sources_of(task)) == pytest.approx(1)
    expected = sum(p * entropy(joint_of(task, s).values()) for s, p in sources_of(task))
    assert task.conditional_entropy == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", SMALL)
def test_what_one_shot_drawing_loses_is_what_enumeration_finds(task):
    for source, _ in sources_of(task):
        joint = joint_of(task, source)
        marginals = [collections.Counter() for _ in next(iter(joint)).split()]
        for target, probability in joint.items():
            for marginal, token in zip(marginals, target.split(), strict=True):
                marginal[token] += probability
        drawn = {
            " ".join(tokens): math.prod(m[t] for m, t in zip(marginals, tokens, strict=True))
            for tokens in itertools.product(*marginals)
        }
        assert sum(drawn.values()) == pytest.approx(1)
        assert task.one_shot_valid_mass(source) == pytest.approx(
            sum(probability for target, probability in drawn.items() if target in joint)
        )
        kl = sum(p * math.log(p / drawn[target]) for target, p in joint.items())
        assert task.conditional_total_correlation(source) == pytest.approx(kl, abs=1e-12)


def test_one_mode_is_never_lost():
    task = Synonyms(orders=1, styles=1)
    assert task.one_shot_valid_mass("s1 s2 s3") == 1
    assert task.conditional_total_correlation("s1 s2 s3") == 0
    assert task.conditional_entropy == 0


def test_pairs_are_drawn_uniformly():
    task = Synonyms(words=3, min_words=1, max_words=2)
    number = 1000
    sources, targets = task.pairs("train", number)
    assert task.accuracy(sources, targets) == 1
    expected = {
        (source, target): number * p * probability
        for source, p in sources_of(task)
        for target, probability in task.modes(source)
    }
    counts = collections.Counter(zip(sources, targets, strict=True))
    assert stats.chisquare([counts[pair] for pair in expected], [*expected.values()]).pvalue > 1e-3


def test_pairs_are_a_pure_function_of_seed_and_split():
    task = Synonyms()
    sources, targets = task.pairs("train", 50)
    assert task.pairs("train", 20) == (sources[:20], targets[:20])
    others = [
        task.pairs("validation", 50),
        task.pairs("test", 50),
        Synonyms(seed=1).pairs("train", 50),
    ]
    assert all(not set(sources) & set(other) for other, _ in others)
    assert others[0] != others[1]


def test_the_vocabulary_holds_every_token_once():
    task = Synonyms(words=8, min_words=1, max_words=8)
    tokens = task.tokens
    assert len(set(tokens)) == len(tokens) == 2 + 8 + 4 * 2 + 2 * 2 + 2
    assert tokens[:2] == ("<pad>", "</s>")
    sources, targets = task.pairs("train", 500)
    assert {word for text in sources + targets for word in text.split()} == set(tokens[2:])
    shuffled = Synonyms(words=8, min_words=1, max_words=8, seed=3).tokens
    assert len(shuffled) == len(tokens)
    assert shuffled != tokens


def test_accuracy_is_the_share_of_exact_modes():
    task = Synonyms(words=4, min_words=1, max_words=4)
    source = "s0 s1 s2 s3"
    modes = [target for target, _ in task.modes(source)]
    broken = [" ".join(mode.split()[1:]) for mode in modes]
    assert task.accuracy([source] * 8, modes + broken) == 0.5


def test_the_configuration_names_the_task():
    config = TranslationConfig(words=9, min_words=2, max_words=5, orders=1, styles=1, seed=4)
    expected = Synonyms(words=9, min_words=2, max_words=5, orders=1, styles=1, seed=4)
    assert Synonyms.of(config) == expected
    assert Synonyms.of(TranslationConfig()) == Synonyms()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"min_words": 0}, "must rise"),
        ({"max_words": 65}, "must rise"),
        ({"orders": 3}, "orders must be one of 1, 2"),
        ({"styles": 0}, "styles must be one of 1, 2"),
        ({"styled": 0.9}, "shares of at most 1"),
        ({"styled": float("nan")}, "styled must be finite"),
    ],
)
@unchecked_annotations()
def test_a_bad_task_is_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        Synonyms(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["", "s1 s1", "s64", "t1", "s01"])
def test_no_source_is_refused(source):
    with pytest.raises(ValueError, match=r"is no source: .* words of s0\.\.s63"):
        Synonyms().modes(source)


@unchecked_annotations()
def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="train, validation or test"):
        Synonyms().pairs("all", 3)
    with pytest.raises(ValueError, match="number of pairs is 0"):
        Synonyms().pairs("train", 0)
    for sources, outputs in (([], []), (["s1"], [])):
        with pytest.raises(ValueError, match="one for each"):
            Synonyms().accuracy(sources, outputs)
