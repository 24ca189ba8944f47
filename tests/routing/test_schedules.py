import json
import math

import pytest

from hf_moe.routing.schedules import (
    ConstantSchedule,
    CosineSchedule,
    DecaySchedule,
    ExponentialSchedule,
    LinearSchedule,
    MultiStepSchedule,
    QuarterCosineSchedule,
    SequenceSchedule,
    StepSchedule,
    parse_schedules,
    schedule_from_dict,
)


ALL = [
    ConstantSchedule(0.5),
    LinearSchedule(2.0, 0.3, num_steps=10, delay=4),
    CosineSchedule(2.0, 0.3, num_steps=0.5),
    QuarterCosineSchedule(8, 16, num_steps=0.5),
    DecaySchedule(8, 16, num_steps=1000, factor=0.9, intervals=20),
    MultiStepSchedule((1, 2, 4), num_steps=0.5),
    ExponentialSchedule(2.0, 0.3, num_steps=10, delay=0.1),
    StepSchedule(at=5, before=1.0, after=0.0),
    SequenceSchedule((ConstantSchedule(2.0), LinearSchedule(2.0, 1.0, num_steps=10)), num_steps=(7,)),
]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.type)
def test_json_round_trip_gives_an_equal_schedule(schedule):
    assert schedule_from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize("cls", [LinearSchedule, CosineSchedule, QuarterCosineSchedule, ExponentialSchedule])
def test_ramps_hit_both_ends_exactly_and_stay_there(cls):
    ramp = cls(3.0, 0.1, num_steps=7, delay=2)
    assert [ramp.value(step) for step in (0, 1, 2)] == [3.0] * 3
    assert [ramp.value(step) for step in (9, 10, 10**6)] == [0.1] * 3
    values = [ramp.value(step) for step in range(2, 10)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 8
    assert (ramp.lowest(), ramp.highest()) == (0.1, 3.0)


def test_middle_of_each_ramp():
    assert LinearSchedule(2.0, 1.0, num_steps=10).value(5) == 1.5
    assert CosineSchedule(2.0, 1.0, num_steps=10).value(5) == pytest.approx(1.5)
    assert CosineSchedule(2.0, 0.0, num_steps=3).value(1) == pytest.approx(1 + math.cos(math.pi / 3))
    assert ExponentialSchedule(4.0, 1.0, num_steps=10).value(5) == pytest.approx(2.0)
    assert ExponentialSchedule(-1.0, -4.0, num_steps=2).value(1) == pytest.approx(-2.0)


QUARTERS = (0, 100_000, 200_000, 300_000, 400_000)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (QuarterCosineSchedule(8, 16, num_steps=400_000), [8, 9, 10, 13, 16]),
        (DecaySchedule(8, 16, num_steps=400_000), [8, 12, 14, 15, 16]),
        (MultiStepSchedule((1, 2, 4, 8, 16), num_steps=400_000), [1, 2, 4, 8, 16]),
        # The decreasing mirror images.
        (QuarterCosineSchedule(16, 8, num_steps=400_000), [16, 15, 14, 11, 8]),
        (DecaySchedule(16, 8, num_steps=400_000), [16, 12, 10, 9, 8]),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_the_growth_of_smoe_dropout(schedule, expected):
    assert [round(schedule.value(step)) for step in QUARTERS] == expected
    assert schedule.value(10**9) == expected[-1] and schedule.lowest() == min(expected)


def test_decay_follows_the_released_formula_step_by_step():
    k_min, k_max, total = 2, 16, 1000
    schedule = DecaySchedule(k_min, k_max, num_steps=total)
    for step in range(1, total):
        assert schedule.value(step) == pytest.approx((k_min - k_max) * 0.99 ** (step // (total // 300)) + k_max)
    assert DecaySchedule(2, 16, num_steps=10).value(5) == pytest.approx(16 - 14 * 0.99**5)  # one interval per step


def test_parts_of_a_multi_step_schedule_are_equal():
    values = [MultiStepSchedule((1, 2, 4), num_steps=9).value(step) for step in range(11)]
    assert values == [1.0] * 3 + [2.0] * 3 + [4.0] * 5


def test_evomoes_linear_temperature():
    linear = LinearSchedule(2.0, 0.3, num_steps=100)
    assert linear.value(50) == pytest.approx(1.15) and linear.value(1000) == 0.3


def test_step_is_thrown_at_its_step():
    flag = StepSchedule(at=3)
    assert [flag.value(step) for step in range(5)] == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_sequence_members_count_their_own_steps():
    sequence = SequenceSchedule((StepSchedule(at=1), LinearSchedule(5.0, 3.0, num_steps=2), 7), num_steps=(2, 3))
    assert [sequence.value(step) for step in range(7)] == [0.0, 1.0, 5.0, 4.0, 3.0, 7.0, 7.0]


def test_every_schedule_knows_its_bounds():
    for schedule in ALL:
        values = [schedule.value(step, max_steps=40) for step in (*range(41), 10**6)]
        assert min(values) == schedule.lowest() and max(values) == schedule.highest(), schedule


def test_fractions_are_of_the_whole_run():
    ramp = LinearSchedule(1.0, 0.0, num_steps=0.5, delay=0.25)
    assert [ramp.value(step, max_steps=8) for step in (2, 4, 6)] == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match=r"0\.25 is a fraction of the run, but the number of steps"):
        ramp.value(2)


def test_numbers_are_constants_and_input_is_not_changed():
    description = {"temperature": {"type": "constant", "constant": 2}, "noise_std": 0}
    schedules = parse_schedules(description)
    assert [s.value(9) for s in schedules.values()] == [2.0, 0.0]
    assert description["temperature"] == {"type": "constant", "constant": 2}


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"type": "linaer", "start": 1}, "`type` must be one of .* got 'linaer'. Did you mean 'linear'?"),
        ({"start": 1, "end": 2}, "`type` must be one of .* got None"),
        ({"type": "linear", "start": 1}, r"a 'linear' schedule takes \['delay', 'end', 'num_steps', 'start'\]"),
        ({"type": "linear", "start": 1, "end": 2, "num_steps": 0}, "`num_steps` must be a whole number of steps"),
        ({"type": "linear", "start": 1, "end": 2, "num_steps": 1.5}, "a fraction of the run in .* got 1.5"),
        ({"type": "linear", "start": 1, "end": 2, "num_steps": True}, "`num_steps` must be .* got True"),
        ({"type": "linear", "start": "hot", "end": 2, "num_steps": 3}, "`start` must be a finite number, got 'hot'"),
        ({"type": "cosine", "start": 1, "end": math.inf, "num_steps": 3}, "`end` must be a finite number, got inf"),
        ({"type": "step", "at": -1}, "`at` must be a whole number of steps .at least 0."),
        ({"type": "exponential", "start": 1, "end": 0, "num_steps": 3}, "same sign and not be 0"),
        ({"type": "sequence", "schedules": [1, 2], "num_steps": []}, "2 `schedules` needs 1 lengths in `num_steps`"),
        ({"type": "linear", "start": 1, "end": 2, "num_steps": math.inf}, "`num_steps` must be .* got inf"),
        ({"type": "decay", "start": 1, "end": 2, "num_steps": 9, "factor": 1.0}, "`factor` must be between 0 and 1"),
        (
            {"type": "decay", "start": 1, "end": 2, "num_steps": 9, "intervals": 0},
            "`intervals` must be a whole number",
        ),
        ({"type": "multi_step", "values": [], "num_steps": 9}, "needs at least one of `values`"),
        ({"type": "multi_step", "values": [1, math.inf], "num_steps": 9}, "`values` must be a finite number, got inf"),
        ({"type": "multi_step", "values": [1, 2], "num_steps": math.inf}, "`num_steps` must be .* got inf"),
        ("fast", "must be a dict with `type`, a number or a `Schedule`, got str"),
        (True, "`constant` must be a finite number, got True"),
    ],
)
def test_bad_schedules_name_the_buffer_and_the_mistake(description, message):
    with pytest.raises(ValueError, match=f"the schedule of `k`: .*{message}"):
        parse_schedules({"k": description})


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("temperature", LinearSchedule(1.0, 0.0, num_steps=5), "`temperature` reaches 0.0, but must stay above 0.0"),
        ("temperature", SequenceSchedule((1.0, -1.0), num_steps=(5,)), "`temperature` reaches -1.0"),
        (
            "noise_std",
            StepSchedule(at=3, before=0.1, after=-0.1),
            "`noise_std` reaches -0.1, but must stay at least",
        ),
    ],
)
def test_values_a_buffer_cannot_take_are_refused_before_training(name, schedule, message):
    with pytest.raises(ValueError, match=message):
        parse_schedules({name: schedule})
