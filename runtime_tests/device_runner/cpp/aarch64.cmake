# Cross compilation for arm64 Linux.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
# the SDK is not part of a cross compiler's own root
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)
