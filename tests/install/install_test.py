#!/usr/bin/env python3
"""Installs under DESTDIR, away from the source, and uses only that:

  install_test.py SOURCE BUILD FIXTURE CMAKE CC CXX -- COMMAND...     COMMAND: `make install` or `cmake --install`

the program; the C example by the command in the README, through pkg-config; the C++ example through find_package; both
examples on the tiny model of FIXTURE; the library through ctypes. Then the same after the tree was moved."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

SOURCE, BUILD, FIXTURE, CMAKE, CC, CXX = sys.argv[1:7]
INSTALL = sys.argv[8:]
PREFIX = "/opt/narrows-test"


def run(command, code=0, **options):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout.decode(errors='replace')}"
    return done.stdout


def install(folder):
    env = dict(os.environ, DESTDIR=folder)
    if INSTALL[0] == "make":
        env.pop("DESTDIR")
        run([*INSTALL, f"DESTDIR={folder}", f"PREFIX={PREFIX}"], env=env)
    else:
        run([*INSTALL, PREFIX], env=env)
    return folder + PREFIX


def readme_command():
    """The line of the README that compiles the C example."""
    with open(SOURCE + "/README.md", encoding="utf-8") as file:
        lines = [line.split("#")[0].strip() for line in file if line.startswith("cc ") and "pkg-config" in line]
    assert len(lines) == 1, lines
    return lines[0]


def check_text_files(root):
    """No file that tells others where things are may name our own folders or the place it was staged in."""
    found = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith((".cmake", ".pc", ".h")):
                found += 1
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    text = file.read()
                for path in (SOURCE, BUILD, root):
                    assert path not in text, f"{name} names {path}"
    assert found > 8, found


def check(root, work, want):
    version = re.fullmatch(r"narrows (\d+\.\d+\.\d+)\n", run([root + "/bin/narrows", "--version"]).decode())[1]
    library = next(os.path.join(folder, "libnarrows.so") for folder, _, names in os.walk(root) if "libnarrows.so" in names)
    lib_dir = os.path.dirname(library)
    env = dict(os.environ, PKG_CONFIG_PATH=lib_dir + "/pkgconfig", LD_LIBRARY_PATH=lib_dir, CMAKE_PREFIX_PATH=root)
    assert run(["pkg-config", "--modversion", "narrows"], env=env).decode().strip() == version

    os.makedirs(work + "/examples")
    for name in ("generate.c", "generate.cpp"):
        shutil.copy(f"{SOURCE}/examples/{name}", work + "/examples")
    run(["sh", "-c", re.sub(r"^cc ", CC + " -std=c99 ", readme_command())], cwd=work, env=env)

    with open(work + "/CMakeLists.txt", "w", encoding="utf-8") as file:
        file.write("cmake_minimum_required(VERSION 3.25)\nproject(user LANGUAGES CXX)\n"
                   f"find_package(narrows {version} REQUIRED)\nadd_executable(user examples/generate.cpp)\n"
                   "target_link_libraries(user PRIVATE narrows::narrows)\n")
    run([CMAKE, "-S", work, "-B", work + "/build", "-DCMAKE_CXX_COMPILER=" + CXX], env=env)
    run([CMAKE, "--build", work + "/build"], env=env)

    said = bytes(want["said"]) + b"\n"
    for program in (work + "/generate", work + "/build/user"):
        out = subprocess.run([program, want["path"], want["text"], str(len(want["said"]))], stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, env=env, check=True).stdout
        assert out == said, f"{program} said {out!r}, not {said!r}"
    ctypes_test = ("import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); l.narrows_version.restype = ctypes.c_char_p; "
                   "print(l.narrows_version().decode())")
    assert run([sys.executable, "-c", ctypes_test, library]).decode().strip() == version


def main():
    if shutil.which("pkg-config") is None:
        print("pkg-config is not installed (package pkgconf)")
        return 77
    with tempfile.TemporaryDirectory(prefix="narrows-install-") as folder:
        want = json.loads(run([FIXTURE, folder]))
        root = install(folder + "/stage")
        check_text_files(root)
        assert sorted(os.listdir(root)) == ["bin", "include", "lib"], os.listdir(root)
        assert sorted(os.listdir(root + "/include/narrows")) == sorted(os.listdir(SOURCE + "/include/narrows"))
        check(root, folder + "/first", want)
        os.rename(root, folder + "/moved")
        check(folder + "/moved", folder + "/second", want)
    return 0


if __name__ == "__main__":
    sys.exit(main())
