// What a library of these sources shows to its caller.
#pragma once

#define EXPORTED extern "C" __attribute__((visibility("default")))
