"""Simulators behind one interface; one file each."""

import os
import sys

# MuJoCo looks at these when it is first imported: without a screen it renders by EGL, in software on one thread.
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("LP_NUM_THREADS", "1")
