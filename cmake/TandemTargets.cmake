include(GoogleTest OPTIONAL)

# tandem_library(NAME SRCS a.cc ... DEPS lib ...): a library of ours, static, with our warnings.
# Headers are found from the repository root: #include "common/gguf/gguf.h".
function(tandem_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  if(ARG_SRCS)
    add_library(${name} STATIC ${ARG_SRCS})
    target_link_libraries(${name} PRIVATE tandem_flags PUBLIC tandem_base_flags ${ARG_DEPS})
  else()
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE tandem_base_flags ${ARG_DEPS})
  endif()
endfunction()

# tandem_binary(NAME SRCS main.cc DEPS lib ...): a program, left in build/<preset>/bin.
function(tandem_binary name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE tandem_flags ${ARG_DEPS})
  install(TARGETS ${name} RUNTIME DESTINATION bin)
endfunction()

# ENV of tests over gRPC: what sanitizers say of its libraries, which are built without them, is left out.
set(TANDEM_GRPC_TEST_ENV "TSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/common/rpc/tsan_suppressions.txt"
                         "LSAN_OPTIONS=suppressions=${PROJECT_SOURCE_DIR}/common/rpc/lsan_suppressions.txt")

# tandem_test(NAME SRCS a_test.cc ... DEPS lib ... [LABELS unit] [TIMEOUT seconds] [ENV A=B ...]):
# one GoogleTest program = one ctest entry (its cases are listed in its own output).
function(tandem_test name)
  if(NOT TANDEM_BUILD_TESTS)
    return()
  endif()
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS;LABELS;ENV" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE tandem_flags ${ARG_DEPS} GTest::gmock GTest::gtest GTest::gtest_main)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
  set_property(TEST ${name} PROPERTY ENVIRONMENT
               "TANDEM_SOURCE_DIR=${PROJECT_SOURCE_DIR};TANDEM_BINARY_DIR=${CMAKE_BINARY_DIR};${ARG_ENV}")
endfunction()

# tandem_benchmark(NAME SRCS a_benchmark.cc DEPS lib ...): a Google Benchmark program in build/<preset>/benchmarks.
function(tandem_benchmark name)
  if(NOT TANDEM_BUILD_BENCHMARKS)
    return()
  endif()
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE tandem_flags ${ARG_DEPS} benchmark::benchmark benchmark::benchmark_main)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/benchmarks)
endfunction()
