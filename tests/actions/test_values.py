import numpy as np

from hf_vla.actions.values import middle


def test_the_middle_is_the_mean_or_that_of_a_range():
    ranges = {"min": [0.0, -4.0], "max": [2.0, 4.0]}
    np.testing.assert_array_equal(middle({"mean": [0.5, 1.5], **ranges}, 2), [0.5, 1.5])
    np.testing.assert_array_equal(middle(ranges, 2), [1.0, 0.0])
    np.testing.assert_array_equal(middle({"q01": [1.0], "q99": [2.0], "mean": None}, 1), [1.5])
    np.testing.assert_array_equal(middle({"std": [1.0, 2.0]}, 2), [0.0, 0.0])
