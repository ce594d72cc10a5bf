"""Images from MuJoCo without a display: the OpenGL backend, and the two render profiles.

`faithful` draws what the suites themselves draw. `fast` draws the same scene into a 64×64 buffer without shadows,
reflections and multisampling, and with meshes and round shapes no finer than 64×64 pixels can show.
Pixels of the two differ, so a store records which one it holds.
"""

from __future__ import annotations

import atexit
import copy
import ctypes.util
import hashlib
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

_chosen: dict[str, str] = {}  # backend → why this process took it
_LIBRARIES = {"egl": ("EGL", "libegl1 libgl1-mesa-dri"), "osmesa": ("OSMesa", "libosmesa6")}


def choose_backend() -> str:
    """Sets MUJOCO_GL, unless it is set, to what this machine has. Returns the backend's name.

    Importing `actors` calls it, as mujoco and dm_control read the variable when they are imported.
    """
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    if sys.platform != "linux":
        return "native"
    for backend, (library, _) in _LIBRARIES.items():
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = backend
            _chosen[backend] = f"lib{library} is installed"
            return backend
    packages = " or ".join(packages for _, packages in _LIBRARIES.values())
    raise UsageError(f"No OpenGL library for rendering without a display: apt-get install {packages}.")


def limit_threads() -> None:
    """Keeps Mesa's rasteriser to the thread that draws, unless LP_NUM_THREADS says otherwise. Mesa reads it when mujoco
    is imported.

    One 64×64 image is one tile: threads would only wake up to wait for each other. A shadow map has tiles for all
    cores, but environments in processes of their own share these.
    """
    os.environ.setdefault("LP_NUM_THREADS", "0")


def explain_backend() -> str:
    """The backend and why it is that one, for a person."""
    backend = choose_backend()
    return f"{backend}, as {_chosen.get(backend, 'MUJOCO_GL says')}"


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
    """Draws one camera of one model, in the thread of the first `render`. Those of equal models share a canvas."""

    def __init__(self, model: Any, camera: int, profile: Profile, upside_down: bool = False) -> None:
        """`upside_down`: the camera itself is mounted so, and the image is turned upright."""
        import mujoco

        self.name = f"{profile} mujoco-{mujoco.__version__}"
        self._model, self._profile, self._upside_down = model, profile, upside_down
        self._content = _fingerprint(model)  # before an episode moves things in it
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._camera.fixedcamid = camera
        self._canvas: _Canvas | None = None

    def render(self, data: Any) -> np.ndarray:
        """The image of `data`, an MjData of the model whose positions are up to date: [64, 64, 3] uint8."""
        if self._canvas is None:
            self._canvas = _borrow(self._model, self._content, self._profile, self)
        if threading.get_ident() != self._canvas.thread:
            raise UsageError("An environment renders only in the thread that first reset it: make one for each thread.")
        image = self._canvas.draw(self._model, data, self._camera)
        # OpenGL's rows run from the bottom up; a camera mounted upside down cancels that.
        return image if self._upside_down else image[::-1].copy()

    def close(self) -> None:
        """Gives back what was drawn with. May be called twice."""
        if self._canvas is not None:
            self._canvas.give_back(id(self))
        self._canvas = None


class _Canvas:
    """An OpenGL context, and in it all that a model's images are made of: meshes, textures, buffers, a scene."""

    def __init__(self, model: Any, profile: Profile) -> None:
        import mujoco

        self.thread = threading.get_ident()
        self.borrowers: set[int] = set()
        # The context copies meshes and buffer sizes from the model it is made of; the simulated model stays as it is.
        drawn = copy.copy(model)
        drawn.vis.global_.offwidth = WIDTH
        drawn.vis.global_.offheight = HEIGHT
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._viewport = mujoco.MjrRect(0, 0, WIDTH, HEIGHT)
        self._scene = mujoco.MjvScene(model, maxgeom=max(1000, 2 * model.ngeom))
        if profile == "fast":
            quality = drawn.vis.quality
            quality.offsamples = quality.shadowsize = 0
            quality.numslices, quality.numstacks, quality.numquads = SLICES, STACKS, QUADS
            thin_meshes(drawn, MESH_CELL_M)
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._gl = _gl_context()
        self._gl.make_current()
        self._context = mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def draw(self, model: Any, data: Any, camera: Any) -> np.ndarray:
        """[64, 64, 3] uint8, rows from the bottom up."""
        import mujoco

        self._gl.make_current()  # another one may have been current
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._option, self._perturb, camera, everything, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        image = np.empty(IMAGE_SHAPE, np.uint8)
        mujoco.mjr_readPixels(image, None, self._viewport, self._context)
        return image

    def give_back(self, borrower: int) -> None:
        """Frees it with its last borrower; in another thread it cannot be, and waits for the next one opened in its."""
        self.borrowers.discard(borrower)
        if not self.borrowers and threading.get_ident() == self.thread:
            self.free()

    def free(self) -> None:
        # What belongs to an OpenGL context must be freed while it is current: in another one, equal numbers are
        # other things.
        for key in [key for key, canvas in _canvases.items() if canvas is self]:
            del _canvases[key]
            self._gl.make_current()
            self._context.free()
            self._gl.free()


_canvases: dict[tuple[int, Profile, bytes], _Canvas] = {}  # by thread, profile and content


def _borrow(model: Any, content: bytes, profile: Profile, renderer: Renderer) -> _Canvas:
    """The canvas of this thread for such models."""
    thread = threading.get_ident()
    for canvas in [c for c in _canvases.values() if not c.borrowers and c.thread == thread]:
        canvas.free()
    key = (thread, profile, content)
    if key not in _canvases:
        _canvases[key] = _Canvas(model, profile)
        _free_before_exit()
    _canvases[key].borrowers.add(id(renderer))
    # A renderer that is dropped unclosed is only noted: the collector may come between two calls of another's drawing.
    weakref.finalize(renderer, _canvases[key].borrowers.discard, id(renderer)).atexit = False
    return _canvases[key]


def _free_before_exit() -> None:
    """Frees what a program leaves open before the OpenGL library ends itself, which would be reported as errors.

    Exit handlers run last in, first out: this one is registered anew after every new context, as MuJoCo registers one
    with its first, and dm_control another when it is imported.
    """
    atexit.unregister(_free_all)
    atexit.register(_free_all)


def _free_all() -> None:
    for canvas in list(_canvases.values()):
        if canvas.thread == threading.get_ident():
            canvas.free()


def _fingerprint(model: Any) -> bytes:
    """Equal for models of equal content."""
    import mujoco

    content = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, content)
    return hashlib.blake2b(content, digest_size=16).digest()


def _gl_context() -> Any:
    """A context of the chosen backend, also where mujoco was imported before the choice and has another in its name."""
    backend = choose_backend()
    module = importlib.import_module("mujoco" if backend == "native" else f"mujoco.{backend}")
    return module.GLContext(WIDTH, HEIGHT)


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
