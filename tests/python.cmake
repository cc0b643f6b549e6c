# narrows_python_test(name label script arguments...): a test that is a Python program of the calling folder.
include_guard(GLOBAL)
find_program(NARROWS_PYTHON NAMES python3 REQUIRED)

function(narrows_python_test name label script)
  add_test(NAME ${name} COMMAND "${NARROWS_PYTHON}" "${CMAKE_CURRENT_SOURCE_DIR}/${script}" ${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS ${label} TIMEOUT 300 SKIP_RETURN_CODE 77
    ENVIRONMENT "PYTHONDONTWRITEBYTECODE=1;OMP_WAIT_POLICY=passive")
  if(label STREQUAL "model")
    set_tests_properties(${name} PROPERTIES RUN_SERIAL ON TIMEOUT 1200)
  endif()
endfunction()
