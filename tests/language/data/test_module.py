"""The data module: which tokens are learned, which rows go where and in which order, and what is refused."""

from __future__ import annotations

import lightning
import pytest
import torch
from jsonargparse import ArgumentParser

from language.data.module import InstructionDataModule
from language.data.tokenise import IGNORED
from lit_adapters.errors import DataError
from tests.language.conftest import CHAT, make_tokenizer
from tests.language.data.test_formats import TALK


def pairs(count, words=lambda i: 1 + i % 7):
    return [{"prompt": f"What is {i}?", "response": " ".join(["fox"] * words(i)) + f" {i}"} for i in range(count)]


def module(path, tokenizer, **changes):
    return InstructionDataModule(path, tokenizer, **{"format": "pairs", "batch_size": 4} | changes)


def fitted(path, tokenizer, **changes):
    data = module(path, tokenizer, **changes)
    data.setup("fit")
    return data


def learned(tokenizer, labels):
    """The learned text of one row."""
    return tokenizer.decode(labels[labels != IGNORED])


def only(data):
    """Token ids and labels of the only training document, without padding."""
    (batch,) = data.train_dataloader()
    (ids,), (labels,) = batch["input_ids"], batch["labels"]
    return ids, labels


# What is learned


def test_answer_and_end_token_are_learned_and_nothing_else(write, tokenizer):
    path = write([{"prompt": "What is it?", "response": "A fox."}])
    ids, labels = only(fitted(path, tokenizer, val_fraction=0))
    assert tokenizer.decode(ids) == "What is it?\nA fox.</s>"
    assert learned(tokenizer, labels) == "A fox.</s>"
    assert labels[-1] == tokenizer.eos_token_id
    assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
    _, labels = only(fitted(path, tokenizer, val_fraction=0, mask_prompt=False))
    assert labels[0] == IGNORED
    assert torch.equal(labels[1:], ids[1:])


def test_begin_token_only_where_the_tokenizer_puts_one(write, tokenizer):
    from tokenizers.processors import TemplateProcessing

    path = write([{"prompt": "What is it?", "response": "A fox."}])
    begins = make_tokenizer(bos_token="<s>")
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    ids, labels = only(fitted(path, begins, val_fraction=0))
    assert begins.decode(ids) == "<s>What is it?\nA fox.</s>"
    assert learned(begins, labels) == "A fox.</s>"
    assert begins.decode(only(fitted(path, begins, val_fraction=0, use_chat_template=True))[0]).startswith("<|turn|>")
    data = fitted(path, begins, val_fraction=0)
    (example,) = data.examples("train")
    assert data.encoder.prompt(example) == ids[labels == IGNORED].tolist()


def test_chat_learns_the_assistant_alone(write, tokenizer):
    path = write([{"messages": TALK}])
    data = fitted(path, tokenizer, format="chat", val_fraction=0)
    ids, labels = only(data)
    messages = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer.decode(ids) == messages.removesuffix("\n")
    assert learned(tokenizer, labels) == "Hello</s>See you</s>"
    (example,) = data.examples("train")
    assert data.encoder.prompt(example) == ids[: -len(tokenizer("See you</s>")["input_ids"])].tolist()


def test_end_token_is_appended_where_the_chat_template_ends_otherwise(write, tokenizer):
    settings = {"format": "chat", "chat_template": CHAT.replace("</s>", "<|done|>"), "val_fraction": 0}
    path = write([{"messages": TALK[1:3]}])
    assert learned(tokenizer, only(fitted(path, tokenizer, **settings))[1]) == "Hello<|done|>\n</s>"
    assert learned(tokenizer, only(fitted(path, tokenizer, end_token="<|done|>", **settings))[1]) == "Hello<|done|>"


# What does not fit


@pytest.mark.parametrize("chat", [False, True])
def test_long_text_loses_its_beginning(write, tokenizer, chat):
    text = " ".join(f"word{i}" for i in range(50))
    path = write([{"dialogue": text, "summary": "Words."}])
    whole, _ = only(fitted(path, tokenizer, format="summarisation", val_fraction=0, use_chat_template=chat))
    data = fitted(path, tokenizer, format="summarisation", val_fraction=0, max_length=60, use_chat_template=chat)
    ids, labels = only(data)
    assert int((labels == IGNORED).sum()) == 45 < len(whole)
    prompt = tokenizer.decode(ids[labels == IGNORED])
    assert "Summarize this dialogue.\n\n" in prompt
    assert "word0 " not in prompt
    assert "word48 word49" in prompt
    assert learned(tokenizer, labels) == "Words.</s>"
    (example,) = data.examples("train")
    assert data.encoder.prompt(example) == ids[labels == IGNORED].tolist()


def test_a_shortened_prompt_does_not_tell_the_length_of_its_answer(write, tokenizer):
    """One text of every length with a short answer, a longer one, and one that is too long."""
    answers = ["No.", "Words, many words.", "words " * 20]
    rows = [{"dialogue": "a b c d e f g h i j k l"[:n], "summary": answer} for n in range(1, 24) for answer in answers]
    settings = {"format": "summarisation", "val_fraction": 0, "prompt_template": "{dialogue} ="}
    data = fitted(write(rows), tokenizer, max_length=24, max_answer_length=10, **settings)
    dataset = data.train_dataloader().dataset
    assert len(dataset) == len(rows)
    examples = data.examples("train")
    for start in range(0, len(rows), 3):
        prompts = [ids[labels == IGNORED].tolist() for ((ids, labels),) in (dataset[start + i] for i in range(3))]
        assert prompts[0] == prompts[1] == prompts[2] == data.encoder.prompt(examples[start])
        assert len(prompts[0]) <= 14
        ((_, labels),) = dataset[start + 2]
        assert int((labels != IGNORED).sum()) == 10
    assert len(prompts[0]) == 14
    with pytest.raises(DataError, match="max_answer_length=24 must be at least 1 and below max_length=24"):
        fitted(write(rows), tokenizer, max_length=24, max_answer_length=24, **settings)


def test_long_answers_lose_their_end_and_long_prompts_are_dropped(write, tokenizer, caplog):
    rows = [
        {"prompt": "What?", "response": "fox " * 40},
        {"prompt": "What " * 40, "response": "Nothing."},
        {"prompt": "Who?", "response": "A dog."},
    ]
    with caplog.at_level("INFO"):
        data = fitted(write(rows), tokenizer, val_fraction=0, max_length=20)
    (batch,) = data.train_dataloader()
    assert sorted(batch["attention_mask"].sum(1).tolist())[1] == 20
    texts = {learned(tokenizer, labels) for labels in batch["labels"]}
    assert "A dog.</s>" in texts
    (cut,) = texts - {"A dog.</s>"}
    assert cut.startswith("fox fox")
    assert not cut.endswith("</s>")
    messages = [r.getMessage() for r in caplog.records if "were cut" in r.getMessage()]
    assert messages == [
        "Data: of 3 train rows 1 were cut to max_length=20 tokens and 1 dropped because nothing to learn would have "
        "been left."
    ]
    with pytest.raises(DataError, match="over 20: raise max_length"):
        data.encoder.prompt(data.examples("train")[1])


@pytest.mark.parametrize("name", ["pairs", "summarisation"])
def test_no_row_fits(write, tokenizer, name):
    path = write([{"prompt": "What " * 9, "response": "x" * 9, "dialogue": "What " * 9, "summary": "Wordy " * 9}])
    with pytest.raises(DataError, match="none of 1 rows has room for an answer in max_length=8"):
        fitted(path, tokenizer, format=name, val_fraction=0, max_length=8)


def test_every_row_has_a_learned_token(write, tokenizer):
    path = write(pairs(40, words=lambda i: 1 + i))
    for packing in ("none", "packed", "buckets"):
        for length in (8, 11, 30):
            data = fitted(path, tokenizer, packing=packing, max_length=length)
            for batch in data.train_dataloader():
                assert (batch["labels"] != IGNORED).any(1).all()
                assert batch["input_ids"].shape[1] <= length


# Tokenizers


def test_padding_with_the_end_token_is_said_and_masked(write, caplog):
    tokenizer = make_tokenizer(pad_token=None)
    with caplog.at_level("INFO"):
        data = fitted(write(pairs(8)), tokenizer)
        (batch, *_) = data.train_dataloader()
    assert "padding with the end token '</s>'" in caplog.text
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["input_ids"][padding] == tokenizer.eos_token_id).all()
    assert (batch["labels"][padding] == IGNORED).all()
    assert (batch["labels"] == tokenizer.eos_token_id).sum() == len(batch["labels"])
    assert tokenizer.pad_token is None


def test_tokenizer_without_an_end_token(write):
    tokenizer = make_tokenizer(eos_token=None)
    path = write([{"prompt": "What is it?", "response": "A fox."}])
    with pytest.raises(DataError, match="has no end token: name one of its tokens in end_token"):
        fitted(path, tokenizer, val_fraction=0)
    with pytest.raises(DataError, match="'<end>' is not a token of"):
        fitted(path, tokenizer, val_fraction=0, end_token="<end>")
    assert learned(tokenizer, only(fitted(path, tokenizer, val_fraction=0, end_token="<|done|>"))[1]).endswith(
        "<|done|>"
    )


# Which rows


def prompts(data, split):
    return [example.prompt for example in data.examples(split)]


def test_splits_are_disjoint_and_seeded(write, tokenizer):
    path = write(pairs(100))
    data = module(path, tokenizer, test_fraction=0.2)
    splits = {split: prompts(data, split) for split in ("train", "val", "test")}
    assert [len(split) for split in splits.values()] == [70, 10, 20]
    assert len(set().union(*splits.values())) == 100
    assert prompts(module(path, tokenizer, test_fraction=0.2, order_seed=7, val_fraction=0.3), "test") == splits["test"]
    assert prompts(module(path, tokenizer, test_fraction=0.2, seed=7), "test") != splits["test"]


def test_equal_prompts_stay_together(write, tokenizer):
    rows = [{"prompt": f"What is {i % 10}?", "response": str(i)} for i in range(100)]
    data = module(write(rows), tokenizer, val_fraction=0.15)
    train, val = set(prompts(data, "train")), set(prompts(data, "val"))
    assert (len(train), len(val)) == (8, 2)
    assert not train & val


def test_subsets(write, tokenizer):
    path = write(pairs(100))
    data = module(path, tokenizer, train_subset=10, val_subset=3)
    assert (len(prompts(data, "train")), len(prompts(data, "val"))) == (10, 3)
    assert set(prompts(module(path, tokenizer, train_subset=4), "train")) < set(prompts(data, "train"))
    assert prompts(module(path, tokenizer, train_subset=10, seed=1), "train") != prompts(data, "train")
    with pytest.raises(DataError, match="train_subset=91, but the train split has 90 rows"):
        module(path, tokenizer, train_subset=91).setup("fit")


def test_subsets_with_different_indices_are_disjoint(write, tokenizer):
    path = write(pairs(100))
    subsets = [module(path, tokenizer, train_subset=20, subset_index=i) for i in range(4)]
    assert prompts(subsets[0], "train") == prompts(module(path, tokenizer, train_subset=20), "train")
    assert len(set().union(*(prompts(data, "train") for data in subsets))) == 80
    assert len({tuple(prompts(data, "val")) for data in subsets}) == 1
    with pytest.raises(DataError, match=r"subset_index=4 is too large: .* 90 rows, so that there are 4"):
        module(path, tokenizer, train_subset=20, subset_index=4).setup("fit")


def test_own_files_for_splits(tmp_path, write, tokenizer):
    train = write(pairs(6), "train.jsonl")
    val = write([{"prompt": "val", "response": "x"}], "other.jsonl")
    data = module(train, tokenizer, val_path=val, test_fraction=0.2)
    assert prompts(data, "val") == ["val\n"]
    assert (len(prompts(data, "train")), len(prompts(data, "test"))) == (4, 2)
    write([{"prompt": "test", "response": "x"}], "test.jsonl")
    assert prompts(module(str(tmp_path), tokenizer), "test") == ["test\n"]
    assert len(prompts(module(str(tmp_path), tokenizer, val_fraction=0), "train")) == 6


def test_the_test_split_is_touched_by_test_only(write, tokenizer, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{")
    data = fitted(write(pairs(10)), tokenizer, test_path=str(bad))
    data.setup("validate")
    list(data.train_dataloader()), list(data.val_dataloader())
    with pytest.raises(DataError, match=r"bad\.jsonl line 1"):
        data.setup("test")


def test_missing_splits(write, tokenizer):
    data = fitted(write(pairs(10)), tokenizer, val_fraction=0)
    assert data.val_dataloader() == []
    for stage, split in (("validate", "val"), ("test", "test")):
        with pytest.raises(DataError, match=f"there is no {split} data: set {split}_path, or {split}_fraction"):
            data.setup(stage)
    with pytest.raises(DataError, match=r"setup\('test'\) has not run"):
        data.test_dataloader()
    with pytest.raises(DataError, match="split 'dev' is unknown"):
        data.examples("dev")
    with pytest.raises(DataError, match="leaves none to train on"):
        fitted(write(pairs(1)), tokenizer)


@pytest.mark.parametrize("packing", ["none", "packed", "buckets"])
def test_every_document_once_per_epoch(write, tokenizer, packing):
    data = fitted(write(pairs(41)), tokenizer, val_fraction=0, packing=packing, max_length=64)
    texts = "".join(tokenizer.decode(row) for batch in data.train_dataloader() for row in batch["input_ids"])
    assert all(texts.count(f" {i}</s>") == 1 for i in range(41))


# In which order


def epochs(data, count=2):
    loader = data.train_dataloader()
    result = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        result.append(list(loader))
    return result


def same(one, other):
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("packing", ["none", "packed", "buckets"])
def test_order_depends_on_seed_and_epoch_only(write, tokenizer, packing):
    path = write(pairs(60))
    settings = {"packing": packing, "max_length": 48}
    reference = epochs(fitted(path, tokenizer, **settings))
    state = torch.get_rng_state()
    for workers in (0, 2):
        torch.manual_seed(workers + 1)
        again = epochs(fitted(path, tokenizer, num_workers=workers, **settings))
        assert all(same(a, b) for a, b in zip(again, reference, strict=True))
    torch.set_rng_state(state)
    epochs(fitted(path, tokenizer, **settings))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(reference[0], reference[1])
    assert not same(epochs(fitted(path, tokenizer, order_seed=1, **settings))[0], reference[0])


class Recorder(lightning.LightningModule):
    """Keeps the training batches it is shown, one list per epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def on_train_epoch_start(self):
        self.seen.append([])

    def training_step(self, batch, _):
        self.seen[-1].append({k: v.clone() for k, v in batch.items()})
        return self.weight * 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("packing", ["packed", "buckets"])
@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_trainer_tells_the_sampler_the_epoch(write, tokenizer, tmp_path, packing):
    path = write(pairs(40))
    settings = {"packing": packing, "max_length": 40}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    expected = epochs(fitted(path, tokenizer, **settings), 3)
    model = Recorder()
    trainer = lightning.Trainer(max_epochs=2, enable_checkpointing=False, limit_val_batches=0, **quiet)
    trainer.fit(model, datamodule=module(path, tokenizer, **settings))
    assert all(same(a, b) for a, b in zip(model.seen, expected, strict=False))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = Recorder()
    trainer = lightning.Trainer(max_epochs=3, enable_checkpointing=False, limit_val_batches=0, **quiet)
    trainer.fit(resumed, datamodule=module(path, tokenizer, **settings), ckpt_path=tmp_path / "two.ckpt")
    assert len(model.seen) == 2
    assert len(resumed.seen) == 1
    assert same(resumed.seen[0], expected[2])


# The cache


def test_cache_is_used_and_depends_on_everything(write, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    path = write(pairs(12))
    first = epochs(fitted(path, tokenizer, cache_dir=str(cache)))
    assert len(list(cache.glob("*.safetensors"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr("language.data.tokenise.Encoder.documents", None)  # would raise if called
        assert all(map(same, epochs(fitted(path, tokenizer, cache_dir=str(cache))), first))
    changes = [
        {"max_length": 9},
        {"mask_prompt": False},
        {"prompt_template": "{prompt} "},
        {"use_chat_template": True},
        {"end_token": "<|done|>"},
        {"seed": 1},
    ]
    for number, change in enumerate(changes, 2):
        fitted(path, tokenizer, cache_dir=str(cache), **change)
        assert len(list(cache.glob("*.safetensors"))) == 2 * number, change
    other = make_tokenizer()
    other.add_tokens(["What"])
    fitted(path, other, cache_dir=str(cache))
    assert len(list(cache.glob("*.safetensors"))) == 2 * len(changes) + 4
    other = make_tokenizer()
    other.bos_token = other.eos_token  # chat templates may write it
    fitted(path, other, cache_dir=str(cache))
    assert len(list(cache.glob("*.safetensors"))) == 2 * len(changes) + 6


def test_torn_cache_is_made_anew_and_counts_survive(write, tokenizer, tmp_path, caplog):
    path = write(pairs(12, words=lambda i: 1 + 10 * i))
    settings = {"cache_dir": str(tmp_path / "cache"), "max_length": 30}
    reference = epochs(fitted(path, tokenizer, **settings))
    with caplog.at_level("INFO"):
        fitted(path, tokenizer, **settings)
    assert "were cut" in caplog.text
    for file in (tmp_path / "cache").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    assert all(map(same, epochs(fitted(path, tokenizer, **settings)), reference))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot use cache_dir"):
        fitted(path, tokenizer, cache_dir=str(tmp_path / "file"))


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"train_subset": 0}, "train_subset=0"),
        ({"train_subset": 2, "subset_index": -1}, "subset_index=-1 must be at least 0"),
        ({"subset_index": 1}, "subset_index=1 needs train_subset"),
        ({"max_length": 1}, "max_length=1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"test_fraction": -0.1}, "test_fraction=-0.1"),
        ({"format": "chat", "prompt_template": "x"}, "prompt_template has no meaning"),
    ],
)
def test_bad_settings(tokenizer, change, message):
    with pytest.raises(DataError, match=message):
        module("x", tokenizer, **change)


def test_command_line_types(write):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(InstructionDataModule, "data")
    path = write(pairs(20))
    arguments = ["--data.path", path, "--data.tokenizer", "tiny_llama", "--data.format", "pairs"]
    arguments += ["--data.columns", "{prompt: prompt}", "--data.val_path", f"[{path}, {path}]"]
    data = parser.instantiate(parser.parse_args(arguments)).data
    data.setup("fit")
    assert len(data.examples("val")) == 40
    assert next(iter(data.train_dataloader()))["input_ids"].shape[0] == 8
