from conftest import run_training


def test_a_run_from_start_to_end(tiny):
    result = run_training(tiny())
    assert result is not None
    assert result["best_step"] in (5, 10, 15, 20)
