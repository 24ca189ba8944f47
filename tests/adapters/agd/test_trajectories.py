"""Trajectories on disk: what is stored, going on after an interruption, budgets, and the dataset over them."""

import json
import pickle
import shutil

import pytest
import torch
from common.tiny_denoisers import PlainDenoiser
from torch.utils.data import DataLoader

from hf_moe.adapters.agd import AgdDataset, DenoisingLoop, guided, record_trajectories


class Euler:
    """A scheduler of one line."""

    def set_timesteps(self, number):
        self.timesteps = torch.linspace(1000, 100, number)

    def step(self, prediction, t, x):
        return x - prediction / len(self.timesteps)


CLASSES = {"c": torch.arange(10) % 5}


def loop(steps=4, net=None):
    return DenoisingLoop(net or PlainDenoiser(), Euler(), (4, 6), {"c": 5}, num_inference_steps=steps)


def record(folder, sampler=None, conditions=CLASSES, **settings):
    settings = {"scale_range": (1.0, 6.0), "shard_size": 4, "dtype": "float32"} | settings
    return record_trajectories(sampler or loop(), conditions, folder, **settings)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_items_are_the_students_call_and_the_teachers_answer(tmp_path):
    dataset = AgdDataset(record(tmp_path))
    assert len(dataset) == 10 * 4 and dataset.steps == 4
    net, scales = PlainDenoiser(), set()
    for number in (0, 3, 17, 39):
        item = dataset[number]
        assert item.keys() == {"x", "t", "c", "agd_scale", "agd_target"}
        assert item["c"] == CLASSES["c"][number // 4]
        assert item["t"].item() == torch.linspace(1000, 100, 4)[number % 4].item()
        scales.add(item["agd_scale"].item())
        x, t = item["x"][None], item["t"][None]
        with torch.no_grad():
            e_c, e_u = net(x, t, item["c"][None]), net(x, t, torch.tensor([5]))
        expected = guided(e_u, e_c, item["agd_scale"])
        torch.testing.assert_close(item["agd_target"][None], expected, rtol=1e-4, atol=1e-5)
    assert len(scales) == 3  # items 0 and 3 are of one trajectory
    assert all(1.0 <= scale <= 6.0 for scale in scales)
    # the next step's input follows from the guided prediction: the trajectory itself was guided
    torch.testing.assert_close(dataset[0]["x"] - dataset[0]["agd_target"] / 4, dataset[1]["x"])
    assert dataset[-1]["c"] == dataset[39]["c"]
    with pytest.raises(IndexError):
        dataset[40]


def test_a_dataset_feeds_workers_and_survives_pickling(tmp_path):
    dataset = AgdDataset(record(tmp_path, dtype="float16"))
    first = dataset[5]
    assert first["x"].dtype == torch.float16 and first["t"].dtype == torch.float32
    again = pickle.loads(pickle.dumps(dataset))
    whole = AgdDataset(tmp_path, in_memory=True)
    assert all(torch.equal(whole[5][name], value) for name, value in first.items())
    assert all(torch.equal(again[5][name], value) for name, value in first.items())
    batch = next(iter(DataLoader(dataset, batch_size=7)))
    assert batch["x"].shape == (7, 4, 6) and batch["agd_scale"].shape == (7,)


def test_an_interrupted_recording_goes_on_to_the_same_files(tmp_path):
    expected = files(record(tmp_path / "whole"))
    assert set(expected) == {"index.json", *(f"shard-0000{n}.safetensors" for n in range(3))}
    calls = []

    class Interrupted(DenoisingLoop):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(*args, **kwargs)

    sampler = Interrupted(PlainDenoiser(), Euler(), (4, 6), {"c": 5}, 4)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "parts", sampler)
    assert len(AgdDataset(tmp_path / "parts")) == 4 * 4  # what is there is usable
    assert set(files(tmp_path / "parts")) == {"index.json", "shard-00000.safetensors"}
    record(tmp_path / "parts", sampler)
    assert len(calls) == 4 and files(tmp_path / "parts") == expected
    record(tmp_path / "parts", sampler)
    assert len(calls) == 4  # nothing left to do
    (tmp_path / "parts" / "shard-00001.safetensors").unlink()
    record(tmp_path / "parts", sampler)
    assert files(tmp_path / "parts") == expected


def test_a_folder_of_other_trajectories_is_refused(tmp_path):
    record(tmp_path)
    before = files(tmp_path)
    for change in (
        {"scale_range": (1.0, 7.0)},
        {"seed": 1},
        {"step_stride": 2},
        {"dtype": "bfloat16"},
        {"conditions": {"c": torch.zeros(10, dtype=torch.long)}},
    ):
        with pytest.raises(ValueError, match=f"recorded with `{next(iter(change))}`"):
            record(tmp_path, **change)
    assert files(tmp_path) == before


def test_a_budget_that_is_too_small_loses_nothing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"10 trajectories need about \d+ bytes .*`max_bytes` is 1000"):
        record(tmp_path / "new", max_bytes=1000)
    assert not files(tmp_path / "new")
    expected = files(record(tmp_path / "whole"))
    needed = sum(len(content) for content in expected.values())
    record(tmp_path / "enough", max_bytes=needed)
    usage = shutil.disk_usage(tmp_path)
    full = iter([usage, usage._replace(free=10)])
    monkeypatch.setattr("hf_moe.adapters.agd.trajectories.shutil.disk_usage", lambda _: next(full))
    with pytest.raises(ValueError, match=r"the disk has 10 bytes left. The 4 recorded so far stay"):
        record(tmp_path / "full")
    monkeypatch.undo()
    assert set(files(tmp_path / "full")) == {"index.json", "shard-00000.safetensors"}
    assert files(record(tmp_path / "full")) == expected


def test_a_failing_write_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("hf_moe.adapters.agd.trajectories.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        record(tmp_path)
    assert not files(tmp_path)


def test_strides_and_conditional_predictions(tmp_path):
    every = AgdDataset(record(tmp_path / "every"))
    some = AgdDataset(record(tmp_path / "some", step_stride=3, store_conditional=True))
    assert some.steps == 2 and some.has_conditional and not every.has_conditional
    for step, of_all in ((0, 0), (1, 3)):
        assert torch.equal(some[step]["x"], every[of_all]["x"])
    item, net = some[1], PlainDenoiser()
    with torch.no_grad():
        conditional = net(item["x"][None], item["t"][None], item["c"][None])[0]
    torch.testing.assert_close(item["agd_conditional"], conditional, rtol=1e-4, atol=1e-5)


def test_any_callable_is_a_sampler_and_its_mistakes_are_named(tmp_path):
    def silent(conditions, scales, generator, observe):
        return None

    def huge(conditions, scales, generator, observe):
        loop()({"c": conditions["c"]}, scales * 1e6, generator, observe)

    with pytest.raises(ValueError, match="never called `observe`"):
        record(tmp_path, silent)
    with pytest.raises(ValueError, match="float16 cannot hold"):
        record(tmp_path, huge, dtype="float16")
    for settings, message in (
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"scale_range": (6.0, 1.0)}, "lower one first"),
        ({"shard_size": 0}, "`shard_size` must be at least 1"),
        ({"conditions": []}, "`conditions` is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            record(tmp_path, **settings)
    with pytest.raises(ValueError, match="holds no trajectories"):
        AgdDataset(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"shards": []}))
    with pytest.raises(ValueError, match="no complete shard"):
        AgdDataset(tmp_path)
