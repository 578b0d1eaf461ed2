"""The repository as a whole: layers, imports, builds, wheels, C++ programs, benchmarks, docs."""
