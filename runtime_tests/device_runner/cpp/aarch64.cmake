# Cross compilation with Debian's g++-aarch64-linux-gnu.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# the SDK is not part of the cross compiler's own root
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)
