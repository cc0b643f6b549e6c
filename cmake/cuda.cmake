# The preset `cuda`: libnarrows_cuda.so for four generations of cards, as machine code; no PTX, so that nothing is compiled at run time.
set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90a-real 120-real CACHE STRING "Cards to compile for")
find_program(NARROWS_NVCC nvcc HINTS ENV CUDACXX ENV CUDA_HOME PATHS /usr/local/cuda/bin PATH_SUFFIXES bin)
if(NOT CMAKE_CUDA_COMPILER AND NARROWS_NVCC)
  set(CMAKE_CUDA_COMPILER "${NARROWS_NVCC}")
endif()
enable_language(CUDA)
add_subdirectory(src/exec/cuda)
