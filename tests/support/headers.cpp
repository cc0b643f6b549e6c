// Carries the precompiled headers that tests share (tests/CMakeLists.txt); a library needs a source.
