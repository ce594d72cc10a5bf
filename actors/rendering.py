"""Images from MuJoCo without a display: the OpenGL backend, and the two render profiles.

`faithful` draws what the suites themselves draw. `fast` draws the same scene into a 64×64 buffer without shadows,
reflections and multisampling, and with meshes and round shapes no finer than 64×64 pixels can show.
Pixels of the two differ, so a store records which one it holds.
"""

from __future__ import annotations

import atexit
import copy
import ctypes.util
import importlib
import os
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.tasks import IMAGE_SHAPE
from gsa.errors import UsageError

if TYPE_CHECKING:
    from actors.environment import Profile

HEIGHT, WIDTH = IMAGE_SHAPE[:2]
# What `fast` draws with; each was measured to move the mean grey level by less than 0.3 of 255.
MESH_CELL_M = 0.005  # a pixel of Meta-World's camera is 10 to 20 mm wide where the hand works
SLICES, STACKS, QUADS = 16, 8, 2  # of a sphere, capsule, cylinder or box; MuJoCo's defaults are 28, 16, 4
SMALL_MESH_FACES = 200  # meshes up to this size are left as they are

_LIBRARIES = {"egl": ("EGL", "libegl1 libgl1-mesa-dri"), "osmesa": ("OSMesa", "libosmesa6")}


def choose_backend() -> str:
    """Sets MUJOCO_GL, unless it is set, to what this machine has. Returns the backend's name.

    Importing `actors` calls it, as mujoco and dm_control read the variable when they are imported.
    """
    # One 64×64 image is one tile: Mesa's rasteriser threads would only wake up to wait for each other.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    if sys.platform != "linux":
        return "native"
    for backend, (library, _) in _LIBRARIES.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return backend
    packages = " or ".join(packages for _, packages in _LIBRARIES.values())
    raise UsageError(f"No OpenGL library for rendering without a display: apt-get install {packages}.")


def check_rendering(deadline_s: float = 60.0) -> str:
    """Draws one frame in a process of its own, as a broken driver may hang or crash. Returns the driver's name.

    UsageError says what is missing.
    """
    backend = choose_backend()
    packages = _LIBRARIES.get(backend, ("", "the driver of your GPU"))[1]
    remedy = f"Install {packages}, or set MUJOCO_GL to egl or osmesa."
    try:
        done = subprocess.run(
            [sys.executable, "-m", "actors.rendering"], capture_output=True, text=True, timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"Rendering with MUJOCO_GL={backend} hung for {deadline_s:g} s. {remedy}") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"Rendering with MUJOCO_GL={backend} failed ({reason}). {remedy}")
    return done.stdout.strip()


class Renderer:
    """Draws one fixed camera of one model. Its OpenGL context belongs to the thread of the first `render`."""

    def __init__(self, model: Any, camera: int, profile: Profile, upside_down: bool = False) -> None:
        """`upside_down`: the camera itself is mounted so, and the image is turned upright."""
        import mujoco

        self.name = f"{profile} mujoco-{mujoco.__version__}"
        self._model, self._profile, self._upside_down = model, profile, upside_down
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = camera
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._viewport = mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        self._gl: Any = None
        self._context: Any = None
        self._scene: Any = None
        self._thread = 0

    def render(self, data: Any) -> np.ndarray:
        """The image of `data`, an MjData of the model whose positions are up to date: [64, 64, 3] uint8."""
        import mujoco

        if self._gl is None:
            self._open()
        if threading.get_ident() != self._thread:
            raise UsageError("An environment renders only in the thread that first reset it: make one for each thread.")
        self._gl.make_current()  # another renderer of this process may have been current
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._option, self._perturb, self._camera, everything, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        image = np.empty(IMAGE_SHAPE, np.uint8)
        mujoco.mjr_readPixels(image, None, self._viewport, self._context)
        # OpenGL's rows run from the bottom up; a camera mounted upside down cancels that.
        return image if self._upside_down else image[::-1].copy()

    def close(self) -> None:
        """Frees the context. May be called twice."""
        if self._gl is not None:
            if threading.get_ident() == self._thread:  # elsewhere it cannot be made current; it goes with its memory
                self._gl.make_current()
                self._context.free()
            self._gl.free()
        self._gl = self._context = self._scene = None

    def _open(self) -> None:
        import mujoco

        self._thread = threading.get_ident()
        # The context copies meshes and buffer sizes from the model it is made of; the simulated model stays as it is.
        drawn = copy.copy(self._model)
        drawn.vis.global_.offwidth = WIDTH
        drawn.vis.global_.offheight = HEIGHT
        self._scene = mujoco.MjvScene(self._model, maxgeom=max(1000, 2 * self._model.ngeom))
        if self._profile == "fast":
            quality = drawn.vis.quality
            quality.offsamples = quality.shadowsize = 0
            quality.numslices, quality.numstacks, quality.numquads = SLICES, STACKS, QUADS
            thin_meshes(drawn, MESH_CELL_M)
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._gl = _gl_context()
        _close_before_exit(self)
        self._gl.make_current()
        self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)


_open_renderers: weakref.WeakSet[Renderer] = weakref.WeakSet()


def _close_before_exit(renderer: Renderer) -> None:
    """Frees what a program leaves open before the OpenGL library ends itself, which would be reported as errors.

    Exit handlers run last in, first out: the first one here is registered after that of the first GLContext.
    """
    if not _open_renderers:
        atexit.register(_close_all)
    _open_renderers.add(renderer)


def _gl_context() -> Any:
    """A context of the chosen backend, also where mujoco was imported before the choice and has another in its name."""
    backend = choose_backend()
    module = importlib.import_module("mujoco" if backend == "native" else f"mujoco.{backend}")
    return module.GLContext(WIDTH, HEIGHT)


def _close_all() -> None:
    for renderer in list(_open_renderers):
        renderer.close()


def thin_meshes(model: Any, cell_m: float) -> None:
    """Merges the vertices of each mesh that share a cell of `cell_m`, in place, and drops the faces that vanish.

    For drawing only: the model must not be simulated afterwards. Vertices stay where they are, so that poses hold;
    each cell keeps the vertex nearest to the mean of its vertices.
    """
    for mesh in range(model.nmesh):
        count = int(model.mesh_facenum[mesh])
        if count <= SMALL_MESH_FACES:
            continue
        vertices = _slice(model.mesh_vertadr, model.mesh_vertnum, mesh)
        faces = _slice(model.mesh_faceadr, model.mesh_facenum, mesh)
        merged = _nearest_to_cell_mean(model.mesh_vert[vertices], cell_m)[model.mesh_face[faces]]
        kept = _distinct_faces(merged)
        target = slice(faces.start, faces.start + len(kept))
        model.mesh_facenormal[target] = model.mesh_facenormal[faces][kept]
        model.mesh_facetexcoord[target] = model.mesh_facetexcoord[faces][kept]
        model.mesh_face[target] = merged[kept]
        model.mesh_facenum[mesh] = len(kept)


def _slice(addresses: np.ndarray, counts: np.ndarray, index: int) -> slice:
    return slice(int(addresses[index]), int(addresses[index]) + int(counts[index]))


def _nearest_to_cell_mean(vertices: np.ndarray, cell_m: float) -> np.ndarray:
    """For each vertex [V, 3] the index of the one that stands for its cell, [V]."""
    _, cell, size = np.unique(np.floor(vertices / cell_m), axis=0, return_inverse=True, return_counts=True)
    cell = cell.ravel()
    mean = np.stack([np.bincount(cell, vertices[:, axis]) for axis in range(3)], 1) / size[:, None]
    nearest_first = np.lexsort((np.linalg.norm(vertices - mean[cell], axis=1), cell))
    _, first = np.unique(cell[nearest_first], return_index=True)
    return nearest_first[first][cell]


def _distinct_faces(faces: np.ndarray) -> np.ndarray:
    """Indices of the faces [F, 3] that have an area, each once; a plate's two sides face two ways and both stay."""
    a, b, c = faces.T
    solid = np.flatnonzero((a != b) & (b != c) & (c != a))
    turned = np.take_along_axis(faces[solid], (faces[solid].argmin(1)[:, None] + np.arange(3)) % 3, 1)
    return solid[np.unique(turned, axis=0, return_index=True)[1]]


def _draw_one_frame() -> None:
    """What `check_rendering` runs: prints the driver's name; raises if the image is not what was drawn."""
    choose_backend()
    import mujoco

    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><light pos='0 0 3'/><camera name='c' pos='0 0 2'/>"
        "<geom size='.5' rgba='1 0 0 1'/></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = Renderer(model, 0, "fast")
    image = renderer.render(data)
    red, green = int(image[HEIGHT // 2, WIDTH // 2, 0]), int(image[HEIGHT // 2, WIDTH // 2, 1])
    if red < 40 or green > red // 2:
        raise RuntimeError(f"a red sphere came out as {image[HEIGHT // 2, WIDTH // 2]}")
    print(f"{os.environ.get('MUJOCO_GL', 'native')} {_driver()}")
    renderer.close()


def _driver() -> str:
    from OpenGL import GL

    return GL.glGetString(GL.GL_RENDERER).decode()


if __name__ == "__main__":
    _draw_one_frame()
