# find_package(squish_nf4 CONFIG REQUIRED) defines squish_nf4::squish_nf4: the op library, its header and torch.
#
# torch: the folder in SQUISH_NF4_TORCH (with include/ and lib/); without that, a target named `torch` that is there
# already (after find_package(Torch), say from a LibTorch archive); else the torch beside this package; else the one
# an editable install was built with. A folder's libraries are linked by their files: torch's own TorchConfig.cmake
# would ask for a CUDA toolkit if torch has CUDA, which a program that calls no CUDA function does not need.
cmake_minimum_required(VERSION 3.18...3.21)
get_filename_component(_squish_nf4_package "${CMAKE_CURRENT_LIST_DIR}/.." REALPATH)
set(_squish_nf4_library "${_squish_nf4_package}/libsquish_nf4.so")
set(squish_nf4_FOUND FALSE)  # until the end

if(NOT EXISTS "${_squish_nf4_library}" OR NOT EXISTS "${_squish_nf4_package}/_build_info.py")
  string(CONCAT squish_nf4_NOT_FOUND_MESSAGE "squish_nf4 in ${_squish_nf4_package} has no op library; build it: "
                                             "pip install --no-build-isolation .")
  return()
endif()
file(STRINGS "${_squish_nf4_package}/_build_info.py" _squish_nf4_built REGEX "^TORCH_(VERSION|ROOT) = ")
string(REGEX MATCH "TORCH_VERSION = '([0-9]+\\.[0-9]+)" _squish_nf4_match "${_squish_nf4_built}")
set(_squish_nf4_wanted "${CMAKE_MATCH_1}")
string(REGEX MATCH "TORCH_ROOT = '([^']*)'" _squish_nf4_match "${_squish_nf4_built}")
set(_squish_nf4_built_with "${CMAKE_MATCH_1}")

if(DEFINED CACHE{SQUISH_NF4_TORCH})
  # Once it is a PATH, a relative folder of the command line starts where cmake was started.
  set(SQUISH_NF4_TORCH "" CACHE PATH "The folder of LibTorch or of Python's torch, for squish_nf4")
endif()
string(CONCAT _squish_nf4_advice "set SQUISH_NF4_TORCH to the folder of LibTorch or of Python's torch "
                                 "(python -c 'import torch; print(torch.__path__[0])')")
set(_squish_nf4_root "")
if(TARGET torch AND NOT SQUISH_NF4_TORCH)
  set(_squish_nf4_torch torch)
  set(_squish_nf4_where "behind this project's target `torch`")
  get_target_property(_squish_nf4_headers torch INTERFACE_INCLUDE_DIRECTORIES)
else()
  set(_squish_nf4_torch squish_nf4::torch)
  set(_squish_nf4_places "${_squish_nf4_package}/../torch" "${_squish_nf4_built_with}")
  if(SQUISH_NF4_TORCH)
    get_filename_component(_squish_nf4_places "${SQUISH_NF4_TORCH}" ABSOLUTE)
  endif()
  foreach(_squish_nf4_place IN LISTS _squish_nf4_places)
    if(NOT _squish_nf4_root AND EXISTS "${_squish_nf4_place}/lib/libtorch_cpu.so")
      get_filename_component(_squish_nf4_root "${_squish_nf4_place}" REALPATH)
    endif()
  endforeach()
  if(NOT _squish_nf4_root)
    set(squish_nf4_NOT_FOUND_MESSAGE "squish_nf4 finds no torch; ${_squish_nf4_advice}")
    if(SQUISH_NF4_TORCH)
      string(CONCAT squish_nf4_NOT_FOUND_MESSAGE "SQUISH_NF4_TORCH is ${_squish_nf4_places}, but there is no "
                                                 "lib/libtorch_cpu.so in it; ${_squish_nf4_advice}")
    endif()
    return()
  endif()
  set(_squish_nf4_where "in ${_squish_nf4_root}")
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
if(NOT _squish_nf4_found)
  string(CONCAT squish_nf4_NOT_FOUND_MESSAGE
         "squish_nf4 cannot tell which torch is ${_squish_nf4_where}: there is no torch/version.h in its include "
         "directories; ${_squish_nf4_advice}")
  return()
elseif(NOT _squish_nf4_found STREQUAL _squish_nf4_wanted)
  string(CONCAT squish_nf4_NOT_FOUND_MESSAGE
         "squish_nf4 was built for torch ${_squish_nf4_wanted}, but the torch ${_squish_nf4_where} is "
         "${_squish_nf4_found}; build squish_nf4 for that, or ${_squish_nf4_advice}")
  return()
endif()

if(_squish_nf4_torch STREQUAL "squish_nf4::torch" AND NOT TARGET squish_nf4::torch)
  add_library(squish_nf4::torch INTERFACE IMPORTED)
  set_target_properties(squish_nf4::torch PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_squish_nf4_headers}")
  set(_squish_nf4_names torch torch_cpu c10)
  if(EXISTS "${_squish_nf4_root}/lib/libtorch_cuda.so")
    # Not one symbol of it is named by a program; torch looks for what it registers.
    list(APPEND _squish_nf4_names torch_cuda c10_cuda)
  endif()
  set(_squish_nf4_links "")
  foreach(_squish_nf4_name IN LISTS _squish_nf4_names)
    list(APPEND _squish_nf4_links "${_squish_nf4_root}/lib/lib${_squish_nf4_name}.so")
  endforeach()
  # CUDA's own libraries are found by torch's, at run time. So that the op library, wherever it lies, finds them loaded,
  # torch comes first: options stand before libraries. As libraries they give the program its RPATH.
  target_link_options(squish_nf4::torch INTERFACE "-Wl,--no-as-needed" ${_squish_nf4_links})
  target_link_libraries(squish_nf4::torch INTERFACE ${_squish_nf4_links} "-Wl,--allow-shlib-undefined")
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
set(squish_nf4_FOUND TRUE)
