import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gdro_jax.data import prompts
from gdro_jax.data.sources import DataError, Problem


class Letters:
    """A tokenizer of one id a character, spaces left out."""

    eos_token_id: int | None = 7

    def __call__(self, text: list[str], *, padding: bool, truncation: bool) -> Mapping[str, list[list[int]]]:
        assert not padding and not truncation
        return {"input_ids": [[ord(char) for char in one if char != " "] for one in text]}


def problems(*texts: str) -> list[Problem]:
    return [Problem(number, text, "1", "s") for number, text in enumerate(texts)]


def test_templates() -> None:
    assert prompts.render("plain", "2+2={x}") == "2+2={x}"
    assert prompts.render("boxed", "Q {problem}?") == (
        "Q {problem}?\nLet's think step by step and output the final answer within \\boxed{}."
    )
    assert prompts.render("{a} {problem} {", "q") == "{a} q {"


@pytest.mark.parametrize("template", ["boxd", "", "{problem}{problem}", "{question}"])
def test_a_template_without_exactly_one_place_for_the_problem_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template: "):
        prompts.render(template, "q")


def test_overlong_prompts_are_refused_or_dropped_and_ids_stay_dense() -> None:
    given = problems("ab", "abcdef", "abc")
    kept = prompts.prepare(given, Letters(), template="plain", max_tokens=3, on_overlong="drop")
    assert [(problem.id, problem.prompt) for problem in kept.problems] == [(0, "ab"), (1, "abc")]
    assert kept.tokens == ((97, 98), (97, 98, 99))
    assert kept.dropped == (given[1],)
    assert kept.longest == 3
    with pytest.raises(DataError, match="problem 1: its prompt has 6 tokens, more than the 3"):
        prompts.prepare(given, Letters(), template="plain", max_tokens=3)
    assert prompts.prepare(given, Letters(), template="plain").dropped == ()


def test_prompts_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match="problem 0: its prompt has no tokens"):
        prompts.prepare(problems(" "), Letters(), template="plain")
    with pytest.raises(DataError, match="all 1 prompts"):
        prompts.prepare(problems("abc"), Letters(), template="plain", max_tokens=1, on_overlong="drop")
    with pytest.raises(DataError, match="none"):
        prompts.prepare([], Letters())
    with pytest.raises(ValueError, match="on_overlong: 'truncate'"):
        prompts.prepare(problems("a"), Letters(), on_overlong="truncate")
    with pytest.raises(ValueError, match="max_tokens: 0"):
        prompts.prepare(problems("a"), Letters(), max_tokens=0)


def test_stop_tokens_are_the_union_of_all_declarations(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert prompts.stop_tokens(tmp_path, Letters()) == (3, 5, 7)
    assert prompts.stop_tokens(tmp_path) == (3, 5)
    assert prompts.stop_tokens(None, Letters()) == (7,)


@pytest.mark.parametrize(
    "content", ['{"eos_token_id": "end"}', '{"eos_token_id": [true]}', '{"eos_token_id": -1}', "{"]
)
def test_stop_tokens_that_make_no_sense(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"config\.json: "):
        prompts.stop_tokens(tmp_path)
    with pytest.raises(DataError, match="stop tokens"):
        prompts.stop_tokens(tmp_path / "elsewhere")


def test_pad() -> None:
    tokens, mask = prompts.pad([[5, 6, 7], [8], []], prompts.bucket(3, multiple=4), pad_id=9)
    assert tokens.dtype == np.int32 and mask.dtype == np.bool_
    np.testing.assert_array_equal(tokens, [[5, 6, 7, 9], [8, 9, 9, 9], [9, 9, 9, 9]])
    np.testing.assert_array_equal(mask.sum(axis=1), [3, 1, 0])
    with pytest.raises(ValueError, match="length: 2 is too short; the longest prompt has 3"):
        prompts.pad([[1, 2, 3]], 2)


def test_bucket() -> None:
    assert [prompts.bucket(n, multiple=8) for n in (1, 8, 9)] == [8, 8, 16]
    with pytest.raises(ValueError, match="longest"):
        prompts.bucket(0)


@given(
    seed=st.integers(0, 2**31),
    num_prompts=st.integers(1, 60),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_order_never_repeats_an_id_in_a_step_and_covers_each_epoch_once(
    seed: int, num_prompts: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, num_prompts))
    anywhere = prompts.order(seed, data.draw(st.integers(0, 1000)), num_prompts, count)
    assert anywhere.dtype == np.int32 and anywhere.shape == (count,)
    assert len(set(anywhere.tolist())) == count
    assert set(anywhere.tolist()) <= set(range(num_prompts))
    steps = num_prompts // count
    epoch = data.draw(st.integers(0, 3))
    seen = np.concatenate(
        [prompts.order(seed, (epoch * steps + step) * count, num_prompts, count) for step in range(steps)]
    )
    assert len(set(seen.tolist())) == steps * count


def test_order_is_a_function_of_seed_and_position_and_differs_between_them() -> None:
    first = prompts.order(3, 40, 100, 20)
    np.testing.assert_array_equal(first, prompts.order(3, 40, 100, 20))
    assert not np.array_equal(first, prompts.order(4, 40, 100, 20))
    assert not np.array_equal(first, prompts.order(3, 140, 100, 20))  # the same place of the next epoch
    np.testing.assert_array_equal(first[10:], prompts.order(3, 50, 100, 20)[:10])
    assert sorted(prompts.order(3, 0, 100, 100).tolist()) == list(range(100))


def test_order_is_pinned_so_that_a_new_numpy_cannot_change_a_run() -> None:
    assert prompts.order(0, 0, 8, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_the_tail_left_out_differs_between_epochs() -> None:
    left_out = [
        set(range(10))
        - set(np.concatenate([prompts.order(1, 9 * epoch + 3 * step, 10, 3) for step in range(3)]).tolist())
        for epoch in range(8)
    ]
    assert all(len(ids) == 1 for ids in left_out)
    assert len(set.union(*left_out)) > 1


@pytest.mark.parametrize(
    ("seed", "position", "num_prompts", "count"), [(-1, 0, 4, 1), (0, -1, 4, 1), (0, 0, 4, 5), (0, 0, 4, 0)]
)
def test_order_refuses_what_it_cannot_do(seed: int, position: int, num_prompts: int, count: int) -> None:
    with pytest.raises(ValueError, match="not allowed"):
        prompts.order(seed, position, num_prompts, count)


def test_a_tokenizer_gives_back_the_rendered_prompt(qwen_tokenizer: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen_tokenizer)
    for text in (
        "What is $\\frac{1}{2}+1$?",
        "Two lines:\n\n  how many   are parallel? \u2220ABC = 45\u00b0, it's \u4e8c\t",
    ):
        prepared = prompts.prepare(problems(text), tokenizer)
        assert tokenizer.decode(prepared.tokens[0]) == prompts.render("boxed", text)
        assert not set(prepared.tokens[0]) & {
            *prompts.stop_tokens(qwen_tokenizer, tokenizer),
            *tokenizer.all_special_ids,
        }


def test_chat_template_of_qwen3(qwen_tokenizer: Path) -> None:
    """Turns are the template's own special tokens, and the options reach it; the ids are those of transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen_tokenizer)
    begin, end_of_turn = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    problem = Problem(0, "What is 1+1?", "2", "s")
    for chat, end in (({}, "<|im_start|>assistant\n"), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")):
        ready = prompts.prepare([problem], tokenizer, template="boxed", chat=chat)
        text = tokenizer.decode(ready.tokens[0])
        asked = prompts.render("boxed", "What is 1+1?")
        assert text.startswith(f"<|im_start|>user\n{asked}<|im_end|>\n") and text.endswith(end)
        turn = [{"role": "user", "content": asked}]
        want = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False, **chat)
        assert list(ready.tokens[0]) == want and ready.tokens[0][0] == begin
        assert ready.tokens[0].count(begin) == 2 and ready.tokens[0].count(end_of_turn) == 1
    system = prompts.prepare([problem], tokenizer, template="plain", chat={"system": "Be brief."})
    assert tokenizer.decode(system.tokens[0]).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat"
    )


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ({"enable_thinkin": False}, "data.chat.enable_thinkin=False: the tokenizer's chat template has no such option"),
        ({"messages": []}, "data.chat.messages="),
        ({"add_generation_prompt": False}, "data.chat.add_generation_prompt=False"),
        ({"tokenize": True}, "data.chat.tokenize=True"),
        ({"system": 5}, "data.chat={'system': 5}: the tokenizer's chat template refuses it"),
    ],
)
def test_what_a_chat_template_does_not_take_is_named(qwen_tokenizer: Path, chat: dict, words: str) -> None:
    """An option with a typo would change nothing, and nobody would know."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen_tokenizer)
    with pytest.raises(DataError) as error:
        prompts.prepare(problems("ab"), tokenizer, chat=chat)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_without_a_chat_template_is_named() -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        prompts.prepare(problems("ab"), LettersWithoutChat(), chat={})


class LettersWithoutChat(Letters):
    chat_template = None
