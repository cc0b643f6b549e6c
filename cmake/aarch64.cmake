# Toolchain file: Debian's cross compiler for 64-bit ARM; programs run under qemu-user. tools/arm64_kernels.sh uses it.
#   -DNARROWS_ARM64_PACKAGES=DIR   Debian's arm64 packages unpacked: DIR/usr/include, DIR/usr/lib/aarch64-linux-gnu
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)

list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES NARROWS_ARM64_PACKAGES)
set(CMAKE_FIND_ROOT_PATH "${NARROWS_ARM64_PACKAGES}" /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)

# Where the cross compiler's libc is; Highway's library is found by the rpath that CMake sets in a build tree.
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
