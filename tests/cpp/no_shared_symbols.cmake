# Fails if the object file of one instruction set defines a weak symbol. Run with -D NM=... and
# -D OBJECTS=a.o,b.o.
#
# An inline function that the compiler did not inline becomes a weak symbol, and the linker keeps one
# copy of those of the same name. If that is the one compiled for AVX-512, the baseline kernels call
# it too, and die of an illegal instruction on a machine that has none.
string(REPLACE "," ";" objects "${OBJECTS}")
list(FILTER objects INCLUDE REGEX "/kernels_[a-z0-9]+\\.cpp\\.o")
if(NOT objects)
  message(FATAL_ERROR "expected object files kernels_*.cpp.o, got ${OBJECTS}")
endif()

foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} --defined-only --demangle ${object}
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* [WwVvu] [^\n]*" weak "${symbols}")
  list(FILTER weak EXCLUDE REGEX " DW\\.ref\\.")  # an address, of the exception handler
  if(weak)
    list(JOIN weak "\n  " weak)
    message(FATAL_ERROR "${object} defines weak symbols:\n  ${weak}")
  endif()
  message(STATUS "${object}: no weak symbol")
endforeach()
