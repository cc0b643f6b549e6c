# llama.cpp: found or fetched, built once, imported.
#
#   narrows::ggml          tensors, GGUF files, the CPU backend
#   narrows::llama         vocabulary, tokenizer, samplers
#   narrows::llama_internal  libllama's own headers, for its grammar parser: src/llama-grammar.h
#   narrows::llama_common  chat templates (Jinja): common/chat.h
#   narrows::httplib       the HTTP library that llama_common carries: #include <httplib.h>
#
# The source is -DNARROWS_LLAMA_CPP=DIR or the pinned release that tools/fetch_llama_cpp.sh gets. It is built at
# configure time, into the cache folder, under a key of everything that shapes the result: all presets and
# clones share one build, and sanitizer presets link it uninstrumented. After a change in DIR, configure again.

set(NARROWS_LLAMA_CPP "" CACHE PATH "A llama.cpp source tree; empty: the pinned release")

# The same path as in tools/cache_dir.sh.
set(narrows_cache "$ENV{XDG_CACHE_HOME}")
if(NOT narrows_cache)
  set(narrows_cache "$ENV{HOME}/.cache")
endif()
set(narrows_cache "${narrows_cache}/narrows")
if(DEFINED ENV{NARROWS_CACHE} AND NOT "$ENV{NARROWS_CACHE}" STREQUAL "")
  set(narrows_cache "$ENV{NARROWS_CACHE}")
endif()

set(llama_cpp_options
  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DCMAKE_POSITION_INDEPENDENT_CODE=ON
  -DGGML_NATIVE=ON # this machine's instructions: the build stays here
  -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
  -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF)

# In link order: each library needs those after it.
set(llama_cpp_libraries llama-common llama-common-base cpp-httplib llama ggml ggml-cpu ggml-base)

# GCC before 12.4 and 13.3 told the compiler of 8 of the 64 bytes that _tile_loadconfig() reads (PR target/114098), so that
# ggml's tile configuration is optimised away and its products end in a general protection fault where the CPU has AMX.
# This stands before every C++ source of llama.cpp.
set(llama_cpp_tile_config [=[
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
struct narrows_tile_config { char bytes[64]; };
#define _tile_loadconfig(config) \
  __asm__ volatile("ldtilecfg\t%X0" ::"m"(*reinterpret_cast<const narrows_tile_config*>(config)))
#endif
]=])

# Sets source_out to the tree that is asked for.
function(narrows_llama_cpp_source source_out)
  if(NARROWS_LLAMA_CPP)
    set(source "${NARROWS_LLAMA_CPP}")
  else()
    execute_process(COMMAND "${PROJECT_SOURCE_DIR}/tools/fetch_llama_cpp.sh"
      OUTPUT_VARIABLE source OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed)
    if(failed)
      message(FATAL_ERROR "llama.cpp's source could not be fetched (see above); "
        "-DNARROWS_LLAMA_CPP=DIR uses a tree that is already there.")
    endif()
  endif()
  if(NOT EXISTS "${source}/include/llama.h" OR NOT EXISTS "${source}/common/chat.h")
    message(FATAL_ERROR "${source} is not a llama.cpp source tree: include/llama.h or common/chat.h is missing.")
  endif()
  set(${source_out} "${source}" PARENT_SCOPE)
endfunction()

# Sets key_out to a hash of everything that shapes the build.
function(narrows_llama_cpp_key source key_out)
  # What -march=native means on this CPU.
  execute_process(COMMAND ${CMAKE_CXX_COMPILER} -march=native -Q --help=target OUTPUT_VARIABLE native ERROR_QUIET)
  set(key "${source}|${llama_cpp_options}|${CMAKE_C_COMPILER}|${CMAKE_CXX_COMPILER}|${CMAKE_CXX_COMPILER_VERSION}")
  string(APPEND key "|$ENV{CFLAGS}|$ENV{CXXFLAGS}|${native}|${llama_cpp_tile_config}")
  # An edited source file is another build.
  file(GLOB_RECURSE files "${source}/CMakeLists.txt" "${source}/common/*" "${source}/ggml/*" "${source}/include/*"
    "${source}/src/*" "${source}/vendor/*")
  foreach(file IN LISTS files)
    file(TIMESTAMP "${file}" time "%s")
    string(APPEND key "|${time}")
  endforeach()
  string(SHA256 key "${key}")
  string(SUBSTRING "${key}" 0 16 key)
  set(${key_out} ${key} PARENT_SCOPE)
endfunction()

# Builds source in folder; the libraries end up in folder/lib and the object files are removed.
function(narrows_llama_cpp_build source folder)
  cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
  math(EXPR minutes "(7 + ${cores} - 1) / ${cores}") # 7 minutes of one core (measured: 6.4 plus linking)
  message(STATUS "building llama.cpp once, about ${minutes} minutes on ${cores} cores (kept in ${folder})")

  file(MAKE_DIRECTORY "${folder}")
  set(tree "${folder}/tree")
  set(log "${folder}/configure.log")
  file(WRITE "${folder}/tile_config.h" "${llama_cpp_tile_config}")
  execute_process(
    COMMAND ${CMAKE_COMMAND} -S "${source}" -B "${tree}" -G "${CMAKE_GENERATOR}" ${llama_cpp_options}
      -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER} -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
      -DCMAKE_C_COMPILER_LAUNCHER=${CMAKE_C_COMPILER_LAUNCHER} -DCMAKE_CXX_COMPILER_LAUNCHER=${CMAKE_CXX_COMPILER_LAUNCHER}
      "-DCMAKE_CXX_FLAGS=$ENV{CXXFLAGS} -include ${folder}/tile_config.h"
    OUTPUT_FILE "${log}" ERROR_FILE "${log}" RESULT_VARIABLE failed)
  if(NOT failed)
    set(log "${folder}/build.log")
    execute_process(COMMAND ${CMAKE_COMMAND} --build "${tree}" --parallel ${cores} --target ${llama_cpp_libraries}
      OUTPUT_FILE "${log}" ERROR_FILE "${log}" RESULT_VARIABLE failed)
  endif()
  if(failed)
    message(FATAL_ERROR "building llama.cpp failed; the compiler's messages are in ${log}")
  endif()

  foreach(library IN LISTS llama_cpp_libraries)
    file(GLOB_RECURSE archive "${tree}/lib${library}.a")
    file(COPY ${archive} DESTINATION "${folder}/lib")
  endforeach()
  file(REMOVE_RECURSE "${tree}") # ccache still has the objects
  file(TOUCH "${folder}/complete")
endfunction()

# Sets source_out and folder_out (with lib/ in it); one configure at a time, others wait for its result.
function(narrows_llama_cpp source_out folder_out)
  set(lock "${narrows_cache}/llama.cpp.lock")
  file(MAKE_DIRECTORY "${narrows_cache}")
  file(LOCK "${lock}" GUARD FUNCTION RESULT_VARIABLE busy TIMEOUT 0)
  if(busy)
    message(STATUS "another configure is fetching or building llama.cpp: waiting for it")
    file(LOCK "${lock}" GUARD FUNCTION TIMEOUT 3600)
  endif()

  narrows_llama_cpp_source(source)
  narrows_llama_cpp_key("${source}" key)
  set(folder "${narrows_cache}/llama.cpp-build-${key}")
  if(NOT EXISTS "${folder}/complete")
    narrows_llama_cpp_build("${source}" "${folder}")
  endif()
  message(STATUS "llama.cpp: ${source}, built in ${folder}")
  set(${source_out} "${source}" PARENT_SCOPE)
  set(${folder_out} "${folder}" PARENT_SCOPE)
endfunction()

narrows_llama_cpp(llama_cpp_source llama_cpp_build)

foreach(library IN LISTS llama_cpp_libraries)
  add_library(llama_cpp::${library} STATIC IMPORTED)
  set_target_properties(llama_cpp::${library} PROPERTIES IMPORTED_LOCATION "${llama_cpp_build}/lib/lib${library}.a")
endforeach()

# Only the OpenMP library: its compile flag would switch on OpenMP in Eigen, beside our own threads.
find_package(OpenMP REQUIRED)
find_package(Threads REQUIRED)
target_link_libraries(llama_cpp::ggml-base INTERFACE ${OpenMP_CXX_LIBRARIES} Threads::Threads ${CMAKE_DL_LIBS} m)
target_link_libraries(llama_cpp::ggml-cpu INTERFACE llama_cpp::ggml-base)
target_link_libraries(llama_cpp::ggml INTERFACE llama_cpp::ggml-cpu llama_cpp::ggml-base)
target_link_libraries(llama_cpp::llama INTERFACE llama_cpp::ggml)
target_link_libraries(llama_cpp::llama-common INTERFACE llama_cpp::llama-common-base llama_cpp::cpp-httplib llama_cpp::llama)

# Include folders of imported targets are SYSTEM: our warnings stay out of them.
set_target_properties(llama_cpp::ggml PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${llama_cpp_source}/ggml/include")
set_target_properties(llama_cpp::llama PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${llama_cpp_source}/include")
# Not vendor/ as a whole: its nlohmann/json.hpp is another version than Debian's, and chat.h needs neither.
set_target_properties(llama_cpp::llama-common PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${llama_cpp_source}/common")
set_target_properties(llama_cpp::cpp-httplib PROPERTIES
  INTERFACE_INCLUDE_DIRECTORIES "${llama_cpp_source}/vendor/cpp-httplib"
  INTERFACE_LINK_LIBRARIES Threads::Threads)

add_library(llama_cpp::llama-internal INTERFACE IMPORTED)
set_target_properties(llama_cpp::llama-internal PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${llama_cpp_source}/src"
  INTERFACE_LINK_LIBRARIES llama_cpp::llama)

add_library(narrows::ggml ALIAS llama_cpp::ggml)
add_library(narrows::llama ALIAS llama_cpp::llama)
add_library(narrows::llama_internal ALIAS llama_cpp::llama-internal)
add_library(narrows::llama_common ALIAS llama_cpp::llama-common)
add_library(narrows::httplib ALIAS llama_cpp::cpp-httplib)
