# Language level, warnings, sanitizers, output folders, compiler cache.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

option(TANDEM_WERROR "Treat warnings as errors" ON)
option(TANDEM_BUILD_TESTS "Build unit and integration tests" ON)
option(TANDEM_BUILD_BENCHMARKS "Build the Google Benchmark programs" OFF)
set(TANDEM_SANITIZE "" CACHE STRING "Sanitizers, as for -fsanitize=")

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)

find_program(TANDEM_CCACHE ccache)
if(TANDEM_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${TANDEM_CCACHE})
  set(CMAKE_C_COMPILER_LAUNCHER ${TANDEM_CCACHE})
endif()

# Flags of our own code; generated protobuf code uses tandem_base_flags alone.
add_library(tandem_base_flags INTERFACE)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  # The baseline of every program; faster code lives in translation units of its own, chosen at run time.
  target_compile_options(tandem_base_flags INTERFACE -march=x86-64-v2)
endif()
target_include_directories(tandem_base_flags INTERFACE ${PROJECT_SOURCE_DIR})
# Each expression rounds as written: no silent contraction of a*b+c, in any translation unit.
target_compile_options(tandem_base_flags INTERFACE -ffp-contract=off)
if(TANDEM_SANITIZE)
  target_compile_options(tandem_base_flags INTERFACE -fsanitize=${TANDEM_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(tandem_base_flags INTERFACE -fsanitize=${TANDEM_SANITIZE})
  if(TANDEM_SANITIZE MATCHES "undefined")
    target_compile_options(tandem_base_flags INTERFACE -fno-sanitize-recover=undefined)
  endif()
endif()
add_library(tandem_flags INTERFACE)
target_link_libraries(tandem_flags INTERFACE tandem_base_flags)
target_compile_options(tandem_flags INTERFACE -Wall -Wextra)
if(TANDEM_SANITIZE AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # What a sanitizer adds makes GCC see values in Boost that are used before they are set.
  target_compile_options(tandem_flags INTERFACE -Wno-maybe-uninitialized)
endif()
if(TANDEM_WERROR)
  target_compile_options(tandem_flags INTERFACE -Werror)
endif()
