// What csrc/cuda/device.cpp says of a machine with a card, as the emulator says it.

extern "C" const char* prefix_fast_architectures() {
    return "80";
}

extern "C" int prefix_fast_driver_version() {
    return 13000;
}

extern "C" int prefix_fast_runtime_version() {
    return 13000;
}

extern "C" int prefix_fast_device_of_stream(void*) {
    return 0;
}
