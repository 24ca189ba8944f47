import json

from common.examples import load_example


def test_chunks_need_at_most_six_tenths_of_the_memory_and_lose_nothing(tmp_path, capsys):
    benchmark = load_example("benchmarks/distillation_memory")
    result = benchmark.main(["--vocabulary", "49152", "--length", "1024", "--output", str(tmp_path)])
    assert result["ratio"] <= 0.6
    assert result["loss_difference"] <= 1e-5 * result["loss_whole"]
    assert result["gradient_difference"] <= 1e-5
    assert json.loads((tmp_path / "distillation_memory.json").read_text()) == result
    assert f"ratio {result['ratio']:.3f}" in capsys.readouterr().out
