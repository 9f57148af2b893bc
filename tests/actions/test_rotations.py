import itertools

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.spatial.transform import Rotation

from hf_vla.actions.rotations import convert, rotation_shape

FORMATS = [
    "euler_xyz",
    "euler_XYZ",
    "euler_ZYX",
    "euler_zyz",
    "axis_angle",
    "quaternion_wxyz",
    "quaternion_xyzw",
    "rot6d",
    "matrix",
]


def test_rot6d_equals_the_recording(goldens):
    golden = load_file(goldens / "tinyvla_pipeline" / "rot6d.safetensors")
    np.testing.assert_allclose(convert(golden["euler_XYZ"], "euler_XYZ", "rot6d"), golden["rot6d"], atol=1e-12)
    np.testing.assert_allclose(convert(golden["euler_XYZ"], "euler_XYZ", "matrix"), golden["matrix"], atol=1e-12)
    np.testing.assert_allclose(convert(golden["rot6d"], "rot6d", "euler_XYZ"), golden["back_euler_XYZ"], atol=1e-9)
    np.testing.assert_allclose(convert(golden["raw_rot6d"], "rot6d", "matrix"), golden["raw_matrix"], atol=1e-9)
    np.testing.assert_allclose(convert(golden["raw_rot6d"], "rot6d", "euler_XYZ"), golden["raw_euler_XYZ"], atol=1e-9)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMATS, FORMATS)))
def test_any_conversion_keeps_the_rotation_and_the_leading_axes(source, target):
    matrices = Rotation.random(12, rng=np.random.default_rng(0)).as_matrix().reshape(3, 4, 3, 3)
    values = convert(matrices, "matrix", source)
    assert values.shape == (3, 4, *rotation_shape(source))
    converted = convert(values, source, target)
    assert converted.shape == (3, 4, *rotation_shape(target)) and converted.dtype == np.float64
    np.testing.assert_allclose(convert(converted, target, "matrix"), matrices, atol=1e-12)


def test_euler_case_is_extrinsic_or_intrinsic():
    roll, pitch, yaw = 0.3, -0.5, 1.1
    x, y, z = (Rotation.from_rotvec(np.eye(3)[i] * a).as_matrix() for i, a in enumerate((roll, pitch, yaw)))
    np.testing.assert_allclose(convert([roll, pitch, yaw], "euler_xyz", "matrix"), z @ y @ x, atol=1e-12)
    np.testing.assert_allclose(convert([roll, pitch, yaw], "euler_XYZ", "matrix"), x @ y @ z, atol=1e-12)


def test_quaternion_order():
    quarter_turn_z = [0, 0, np.pi / 2]
    half = np.sqrt(0.5)
    np.testing.assert_allclose(convert(quarter_turn_z, "axis_angle", "quaternion_wxyz"), [half, 0, 0, half])
    np.testing.assert_allclose(convert(quarter_turn_z, "axis_angle", "quaternion_xyzw"), [0, 0, half, half])


def test_antipodal_and_unnormalised_quaternions_are_one_rotation():
    quaternions = np.random.default_rng(1).normal(size=(50, 4))
    canonical = convert(quaternions, "quaternion_wxyz", "quaternion_wxyz")
    assert (canonical[:, 0] >= 0).all() and (quaternions[:, 0] < 0).any()
    np.testing.assert_allclose(convert(-3 * quaternions, "quaternion_wxyz", "quaternion_wxyz"), canonical, atol=1e-12)
    # half turns have w = 0 on both sides
    half_turn = np.array([0.0, 0.6, -0.8, 0.0])
    np.testing.assert_array_equal(
        convert(half_turn, "quaternion_wxyz", "quaternion_wxyz"),
        convert(-half_turn, "quaternion_wxyz", "quaternion_wxyz"),
    )


@pytest.mark.parametrize("euler", ["euler_xyz", "euler_XYZ", "euler_zyx"])
@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_gimbal_lock_keeps_the_rotation_without_a_warning(euler, pitch):
    locked = np.array([0.4, pitch, -1.3])
    matrix = convert(locked, euler, "matrix")
    back = convert(matrix, "matrix", euler)  # a scipy warning would fail this test
    assert np.isfinite(back).all()
    np.testing.assert_allclose(convert(back, euler, "matrix"), matrix, atol=1e-7)


@pytest.mark.parametrize("source", ["quaternion_wxyz", "quaternion_xyzw", "rot6d", "matrix"])
@pytest.mark.parametrize("scale", [1e200, 1e308, 1e-3])
def test_scale_does_not_matter(source, scale):
    matrices = Rotation.random(5, rng=np.random.default_rng(2)).as_matrix()
    values = convert(matrices, "matrix", source)
    np.testing.assert_allclose(convert(scale * values, source, "matrix"), matrices, atol=1e-12)


def test_rows_of_rot6d_may_differ_in_length():
    np.testing.assert_allclose(convert([1e200, 0, 0, 5, 1e-3, 0], "rot6d", "matrix"), np.eye(3), atol=1e-12)


def test_no_rotations_are_no_rotations():
    assert convert(np.empty((0, 5, 6)), "rot6d", "matrix").shape == (0, 5, 3, 3)


@pytest.mark.parametrize(
    ("values", "source", "message"),
    [
        ([[1, 0, 0, 0], [0, 0, 0, 0]], "quaternion_wxyz", r"quaternion_wxyz values that name a rotation.*at row 1"),
        ([0, 0, 0, 0, 1, 0], "rot6d", "rot6d values that name a rotation, came .* degenerate"),
        ([1, 2, 3, 2, 4, 6], "rot6d", "degenerate"),
        (np.zeros((3, 3)), "matrix", "matrix values that name a rotation"),
        (np.diag([1, 1, -1]), "matrix", "matrix values that name a rotation"),
        ([0, np.nan, 0], "euler_xyz", "Expected finite euler_xyz values, came NaN or infinity"),
        ([0, np.inf, 0], "axis_angle", "Expected finite axis_angle values"),
        ([0, 1e200, 0], "axis_angle", "axis_angle values that name a rotation, came .* degenerate"),
        ([0, 0, 0], "quaternion_xyzw", r"Expected quaternion_xyzw of shape \(..., 4\), came \(3,\)"),
        (np.zeros(9), "matrix", r"Expected matrix of shape \(..., 3, 3\), came \(9,\)"),
    ],
)
def test_what_is_no_rotation_is_refused(values, source, message):
    with pytest.raises(ValueError, match=message):
        convert(values, source, "axis_angle")


@pytest.mark.parametrize("name", ["euler", "euler_xxy", "euler_xYz", "euler_xyzx", "quaternion", None])
def test_unknown_formats_are_refused(name):
    with pytest.raises(ValueError, match="Unknown rotation format"):
        convert(np.zeros(3), "euler_xyz", name)
