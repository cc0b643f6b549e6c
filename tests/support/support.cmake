# narrows_test_support: what the tests of gguf/ to eval/ and the fuzz targets share. Included by each of their folders.
include_guard(GLOBAL)

add_library(narrows_test_support STATIC "${CMAKE_CURRENT_LIST_DIR}/tiny_model.cpp" "${CMAKE_CURRENT_LIST_DIR}/llama_reference.cpp")
target_include_directories(narrows_test_support PUBLIC
  "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}/src" "${PROJECT_SOURCE_DIR}/tests")
target_link_libraries(narrows_test_support PRIVATE narrows_warnings PUBLIC narrows_engine narrows_text narrows::llama narrows::ggml)
