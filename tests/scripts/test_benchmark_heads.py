import benchmark_heads as benchmark
import pytest


@pytest.mark.slow
def test_sampling_takes_at_most_the_limit_of_the_plain_loops_time_and_gives_the_same_samples():
    """Measured 0.37. The minimum of few runs; CPU seconds, so that neighbours hardly count."""
    _, _, times, plain_times, error = benchmark.compare(3)
    assert benchmark.LIMIT == 0.65 and min(times) < benchmark.LIMIT * min(plain_times)
    assert error < 1e-4


def test_measuring_layers_leaves_the_network_as_it_was(monkeypatch, capsys):
    before = benchmark.conditional_unet1d.MAX_ROWS
    monkeypatch.setattr(
        benchmark, "cpu_seconds", lambda functions, runs: [[function() or 1.0] for function in functions]
    )
    monkeypatch.setattr(benchmark.conditional_unet1d.Conv1d, "forward", lambda self, x: x)
    benchmark.print_products_over_convolutions()
    assert benchmark.conditional_unet1d.MAX_ROWS == before and "256 channels" in capsys.readouterr().out
