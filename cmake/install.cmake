# What `make install` puts under a prefix: the program, libnarrows.so with its headers, and what finds them: a CMake
# package (find_package(narrows), target narrows::narrows) and narrows.pc. Both know their prefix by where they lie, so
# that a tree may be staged (DESTDIR) or moved. There is no static library: it would need llama.cpp's beside it, at
# versions that only we know; libnarrows.so has them inside.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/narrows")
install(TARGETS narrows RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
install(TARGETS narrows_shared EXPORT narrows_targets LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
install(DIRECTORY include/narrows DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.h")

install(EXPORT narrows_targets FILE narrowsTargets.cmake NAMESPACE narrows:: DESTINATION "${package_dir}")
file(WRITE "${PROJECT_BINARY_DIR}/package/narrowsConfig.cmake"
  "include(\"\${CMAKE_CURRENT_LIST_DIR}/narrowsTargets.cmake\")\n")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/package/narrowsConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/package/narrowsConfig.cmake" "${PROJECT_BINARY_DIR}/package/narrowsConfigVersion.cmake"
  DESTINATION "${package_dir}")

# From lib/pkgconfig, or lib/x86_64-linux-gnu/pkgconfig, up to the prefix.
file(RELATIVE_PATH up "/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/")
file(CONFIGURE OUTPUT package/narrows.pc @ONLY CONTENT [=[
prefix=${pcfiledir}/@up@
libdir=${prefix}/@CMAKE_INSTALL_LIBDIR@
includedir=${prefix}/@CMAKE_INSTALL_INCLUDEDIR@

Name: narrows
Description: Long contexts of GGUF language models on ordinary machines
Version: @PROJECT_VERSION@
Libs: -L${libdir} -lnarrows
Cflags: -I${includedir}
]=])
install(FILES "${PROJECT_BINARY_DIR}/package/narrows.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
