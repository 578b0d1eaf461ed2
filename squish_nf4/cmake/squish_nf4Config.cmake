# find_package(squish_nf4 CONFIG REQUIRED) defines squish_nf4::squish_nf4: the op library, its header and torch.
#
# torch: a target named `torch` that is there already (after find_package(Torch), say from a LibTorch archive) is used.
# Otherwise the torch of SQUISH_NF4_TORCH (a folder with include/ and lib/), else the one beside this package, else the
# one this package was built with. Those are linked by their files: torch's own TorchConfig.cmake would ask for a CUDA
# toolkit if torch has CUDA, which a program that calls no CUDA function does not need.
cmake_minimum_required(VERSION 3.18)
get_filename_component(_squish_nf4_package "${CMAKE_CURRENT_LIST_DIR}/.." REALPATH)
set(_squish_nf4_library "${_squish_nf4_package}/libsquish_nf4.so")

macro(_squish_nf4_fail)
  set(squish_nf4_FOUND FALSE)
  string(CONCAT squish_nf4_NOT_FOUND_MESSAGE "" ${ARGN})
  return()
endmacro()

if(NOT EXISTS "${_squish_nf4_library}" OR NOT EXISTS "${_squish_nf4_package}/_build_info.py")
  _squish_nf4_fail("squish_nf4 in ${_squish_nf4_package} has no op library; build it: "
                   "pip install --no-build-isolation .")
endif()
file(STRINGS "${_squish_nf4_package}/_build_info.py" _squish_nf4_built REGEX "^TORCH_(VERSION|ROOT) = ")
string(REGEX MATCH "TORCH_VERSION = '([0-9]+\\.[0-9]+)" _squish_nf4_match "${_squish_nf4_built}")
set(_squish_nf4_wanted "${CMAKE_MATCH_1}")
string(REGEX MATCH "TORCH_ROOT = '([^']*)'" _squish_nf4_match "${_squish_nf4_built}")
set(_squish_nf4_built_with "${CMAKE_MATCH_1}")

if(TARGET torch)
  set(_squish_nf4_torch torch)
  get_target_property(_squish_nf4_headers torch INTERFACE_INCLUDE_DIRECTORIES)
else()
  set(_squish_nf4_torch "")
  foreach(_squish_nf4_place IN ITEMS "${SQUISH_NF4_TORCH}" "${_squish_nf4_package}/../torch" "${_squish_nf4_built_with}")
    if(_squish_nf4_place AND EXISTS "${_squish_nf4_place}/lib/libtorch_cpu.so")
      get_filename_component(_squish_nf4_root "${_squish_nf4_place}" REALPATH)
      set(_squish_nf4_torch squish_nf4::torch)
      break()
    endif()
    if(_squish_nf4_place AND _squish_nf4_place STREQUAL "${SQUISH_NF4_TORCH}")
      _squish_nf4_fail("SQUISH_NF4_TORCH is ${SQUISH_NF4_TORCH}, but there is no lib/libtorch_cpu.so in it")
    endif()
  endforeach()
  if(NOT _squish_nf4_torch)
    _squish_nf4_fail("squish_nf4 finds no torch; set SQUISH_NF4_TORCH to the folder of LibTorch or of Python's torch "
                     "(python -c 'import torch; print(torch.__path__[0])')")
  endif()
  set(_squish_nf4_headers "${_squish_nf4_root}/include;${_squish_nf4_root}/include/torch/csrc/api/include")
endif()

# The op library is C++ inside: it fits one minor version of torch.
set(_squish_nf4_found "")
foreach(_squish_nf4_folder IN LISTS _squish_nf4_headers)
  foreach(_squish_nf4_file IN ITEMS torch/headeronly/version.h torch/version.h)
    if(NOT _squish_nf4_found AND EXISTS "${_squish_nf4_folder}/${_squish_nf4_file}")
      file(STRINGS "${_squish_nf4_folder}/${_squish_nf4_file}" _squish_nf4_lines REGEX "define TORCH_VERSION_M")
      string(REGEX MATCH "TORCH_VERSION_MAJOR ([0-9]+)" _squish_nf4_match "${_squish_nf4_lines}")
      set(_squish_nf4_major "${CMAKE_MATCH_1}")
      string(REGEX MATCH "TORCH_VERSION_MINOR ([0-9]+)" _squish_nf4_match "${_squish_nf4_lines}")
      if(NOT "${CMAKE_MATCH_1}" STREQUAL "")
        set(_squish_nf4_found "${_squish_nf4_major}.${CMAKE_MATCH_1}")
      endif()
    endif()
  endforeach()
endforeach()
if(NOT _squish_nf4_found STREQUAL _squish_nf4_wanted)
  _squish_nf4_fail("squish_nf4 was built for torch ${_squish_nf4_wanted}, but torch ${_squish_nf4_found} "
                   "is found in ${_squish_nf4_root}: build squish_nf4 for it, or set SQUISH_NF4_TORCH")
endif()

if(_squish_nf4_torch STREQUAL "squish_nf4::torch" AND NOT TARGET squish_nf4::torch)
  add_library(squish_nf4::torch INTERFACE IMPORTED)
  set_target_properties(squish_nf4::torch PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_squish_nf4_headers}")
  set(_squish_nf4_names torch torch_cpu c10)
  if(EXISTS "${_squish_nf4_root}/lib/libtorch_cuda.so")
    # Not one symbol of it is named by a program; torch looks for what it registers.
    list(APPEND _squish_nf4_names torch_cuda c10_cuda)
  endif()
  set(_squish_nf4_links "-Wl,--no-as-needed")
  foreach(_squish_nf4_name IN LISTS _squish_nf4_names)
    list(APPEND _squish_nf4_links "${_squish_nf4_root}/lib/lib${_squish_nf4_name}.so")
  endforeach()
  # CUDA's own libraries are found by torch's, at run time.
  target_link_libraries(squish_nf4::torch INTERFACE ${_squish_nf4_links} "-Wl,--as-needed"
                                                    "-Wl,--allow-shlib-undefined")
endif()

if(NOT TARGET squish_nf4::squish_nf4)
  add_library(squish_nf4::squish_nf4 SHARED IMPORTED)
  set_target_properties(squish_nf4::squish_nf4 PROPERTIES
    IMPORTED_LOCATION "${_squish_nf4_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${_squish_nf4_package}/include"
    INTERFACE_COMPILE_FEATURES cxx_std_20
    INTERFACE_LINK_LIBRARIES "${_squish_nf4_torch}")
  # Kept also where a program calls the operators by name alone.
  set_property(TARGET squish_nf4::squish_nf4 PROPERTY INTERFACE_LINK_OPTIONS "-Wl,--no-as-needed")
endif()
set(SQUISH_NF4_LIBRARY "${_squish_nf4_library}")
