# narrows_warnings: an interface library that our own targets link privately (narrows_library, narrows_executable
# and narrows_test do it). It carries the warnings and, in the debug presets, the sanitizers; other people's code
# gets neither.
add_library(narrows_warnings INTERFACE)
target_compile_options(narrows_warnings INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion
  -Wno-sign-conversion) # sizes are size_t, GGUF's and ggml's counts are signed: the casts would hide the formulas

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 sees an overlap in libstdc++'s own `"text" + string` at -O3, where there is none (GCC bug 105651).
  target_compile_options(narrows_warnings INTERFACE -Wno-restrict)
endif()
if(NARROWS_WERROR)
  target_compile_options(narrows_warnings INTERFACE -Werror)
endif()

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC tidies its own memory less often: a tenth of the time of most files, for some 200 MB more while it compiles.
  target_compile_options(narrows_warnings INTERFACE "SHELL:--param ggc-min-heapsize=400000" "SHELL:--param ggc-min-expand=400")
endif()

if(NARROWS_SANITIZE)
  set(flags -fsanitize=${NARROWS_SANITIZE} -fno-omit-frame-pointer)
  if(NARROWS_SANITIZE MATCHES "undefined")
    list(APPEND flags -fno-sanitize-recover=undefined) # a finding fails the test instead of being one line of text
    # A quarter of a file's time to compile goes to checks that find nothing here that the others do not: a read through
    # a null pointer ends the program anyway (AddressSanitizer), which sees the object's bounds too.
    list(APPEND flags -fno-sanitize=null,nonnull-attribute,returns-nonnull-attribute,object-size,vptr)
  endif()
  # libstdc++'s cheap checks (index, empty front()) do not change any layout, so they mix with llama.cpp's objects.
  target_compile_options(narrows_warnings INTERFACE ${flags} -D_GLIBCXX_ASSERTIONS)
  target_link_options(narrows_warnings INTERFACE ${flags})

  add_library(narrows_sanitizer_defaults OBJECT ${CMAKE_CURRENT_LIST_DIR}/sanitizer_defaults.cpp)
  if(NARROWS_SANITIZE MATCHES "thread")
    target_compile_definitions(narrows_sanitizer_defaults PRIVATE NARROWS_TSAN)
  endif()
endif()

# narrows_plain(target): with sanitizers, code that works on no bytes by hand (tests, the CLI, the server) compiles in two
# thirds of the time: without checks of each pointer's alignment and sums, which the folders below them have. (Without
# optimisation it would be half, but then tests run 1.6 times as long: the linker takes unoptimised copies of the standard
# library's small functions for all of a program.)
function(narrows_plain target)
  if(NARROWS_SANITIZE MATCHES "undefined")
    target_compile_options(${target} PRIVATE -fno-sanitize=alignment,pointer-overflow)
  endif()
endfunction()

# narrows_program(target): what every executable of ours needs beside its own sources.
function(narrows_program target)
  target_link_libraries(${target} PRIVATE narrows_warnings)
  if(NARROWS_SANITIZE)
    target_link_libraries(${target} PRIVATE narrows_sanitizer_defaults)
  endif()
endfunction()

# narrows_precompile(target <header>...): other people's large headers that many of the target's files include, compiled
# once, in the sanitizers' builds alone: with -O3 GCC 12 warns inside of precompiled headers where nothing is wrong.
function(narrows_precompile target)
  if(NARROWS_SANITIZE)
    target_precompile_headers(${target} PRIVATE ${ARGN})
  endif()
endfunction()
