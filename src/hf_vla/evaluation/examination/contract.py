"""Checks of what the checkpoint says of its robot: whoever connects it reads this, and what is missing is guessed."""

from collections.abc import Iterator

from hf_vla.evaluation.examination.patient import FAIL, PASS, WARN, Patient, Verdict

GRIPPER_WORDS = ("grip", "finger", "hand", "jaw")


def action_contract(patient: Patient) -> Iterator[Verdict]:
    """Every number of an action has a name, a kind, a frame, a rate, and a gripper two ends."""
    spec, _ = patient.processor.action_codec.specs(patient.key)
    if spec is None:
        yield Verdict(
            FAIL,
            f"Nobody says what the {patient.normalizer.action_dim} numbers of an action mean: give "
            f"action_config['specs'][{patient.key!r}]['action'] names, kind, rotation, frame, control_hz and gripper "
            "(ActionSpec).",
        )
        return
    missing = []
    grips = [name for name in spec.names if any(word in name.lower() for word in GRIPPER_WORDS)]
    if spec.control_hz is None:
        missing.append("control_hz, the rate at which actions are executed")
    if spec.kind != "joint":
        if spec.frame is None:
            missing.append("frame, in which the hand's motion is given")
        if spec.rotation is None and (turning := [name for name in spec.names[3:] if name not in grips]):
            missing.append(f"rotation, the format of what follows x, y and z ({', '.join(turning)})")
    if spec.gripper is None and grips:
        missing.append(f"gripper, which numbers of {grips[0]} mean open and closed")
    said = f"{len(spec.names)} numbers ({', '.join(spec.names)}), {spec.kind}"
    if missing:
        yield Verdict(
            WARN,
            f"Actions are {said}, but the ActionSpec leaves out: {'; '.join(missing)}. Compare with your robot by "
            "hand, or complete it in processor_config.json.",
            {"missing": [each.partition(",")[0] for each in missing]},
        )
        return
    more = [f"rotation {spec.rotation}"] * bool(spec.rotation) + [f"frame {spec.frame}"] * bool(spec.frame)
    if spec.gripper is not None:
        more.append(f"gripper open {spec.gripper.open:+g} closed {spec.gripper.closed:+g}")
    yield Verdict(PASS, f"Actions are {', '.join([said, *more])}, {spec.control_hz:g} Hz.", spec.to_dict())


def state_contract(patient: Patient) -> Iterator[Verdict]:
    """Every number of the state has a name, where the checkpoint takes one."""
    codec = patient.processor.action_codec
    _, spec = codec.specs(patient.key)
    if not codec.takes_state:
        yield Verdict(PASS, "Takes no state of the robot.")
    elif spec is None:
        yield Verdict(
            FAIL,
            f"Needs a state of {codec.state_normalizer(patient.key).action_dim} numbers, but nobody says which: give "
            f"action_config['specs'][{patient.key!r}]['state'] their names (StateSpec).",
        )
    else:
        frame = f", frame {spec.frame}" if spec.frame else ""
        said = f"The state is {len(spec.names)} numbers ({', '.join(spec.names)}){frame}."
        yield Verdict(PASS, said, spec.to_dict())


def camera_contract(patient: Patient) -> Iterator[Verdict]:
    """Cameras have names, by which their pictures are told apart, and sizes."""
    cameras = patient.processor.camera_specs(patient.key)
    if not cameras:
        yield Verdict(
            FAIL,
            "No camera is declared: any picture would be taken for what the policy was trained to see. Give "
            f"camera_config[{patient.key!r}] name, width, height and, where known, intrinsics (CameraSpec).",
        )
        return
    unnamed = [camera for camera in cameras if camera.name is None]
    blind = [camera.name for camera in cameras if camera.intrinsics is None]
    said = ", ".join(
        f"{camera.name or 'one without a name'} ({camera.width} x {camera.height}"
        f"{', calibrated' if camera.intrinsics else ''}{', depth' if camera.depth else ''})"
        for camera in cameras
    )
    if unnamed:
        yield Verdict(
            WARN,
            f"Looks through {said}: without a name any camera's picture passes for it. Name it in camera_config, as "
            "the dataset does.",
        )
    elif blind and _projects(patient):
        yield Verdict(
            WARN, f"Looks through {said}: places in space are computed with intrinsics, and {blind} has none."
        )
    else:
        yield Verdict(PASS, f"Looks through {said}.", {"cameras": [camera.to_dict() for camera in cameras]})


def _projects(patient):
    return getattr(patient.model.config, "use_vision_zoe", False)
