/* In place of CUDA's driver, where there is none: as strict as that one about contexts, captures and shared memory. It
   keeps the parameters of the last launch: pointers first, then integers of 32 bits. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, UNSUPPORTED = 900 };

static __thread void *current;
static __thread int capture_mode; /* 2 is relaxed */
static char context, library, kernel;
static int shared_limit = 48 * 1024;

int launches, loads;
int64_t seen[40];
int pointers = 3, integers = 2;

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13020; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return current ? SUCCESS : INVALID_CONTEXT; }
int cuCtxSetCurrent(void *given) { current = given; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **given, int device) { *given = &context; return SUCCESS; }

int cuThreadExchangeStreamCaptureMode(int *mode) {
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return SUCCESS;
}

int cuLibraryLoadData(void **given, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
    *given = &library;
    if (capture_mode != 2) return UNSUPPORTED;
    if (memcmp(code, "\177ELF", 4)) return INVALID_IMAGE;
    loads++;
    return SUCCESS;
}

int cuLibraryGetKernel(void **given, void *from, const char *name) {
    *given = &kernel;
    return name[0] ? SUCCESS : NOT_FOUND;
}

int cuKernelGetFunction(void **given, void *from) { *given = from; return current ? SUCCESS : INVALID_CONTEXT; }
int cuKernelSetAttribute(int attribute, int value, void *of, int device) { shared_limit = value; return SUCCESS; }

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    int64_t place[] = {gx, gy, gz, bx, by, bz, shared, (int64_t)stream};
    if (!current) return INVALID_CONTEXT;
    if (function != &kernel || (int)shared > shared_limit) return INVALID_VALUE;
    memcpy(seen, place, sizeof place);
    for (int i = 0; i < pointers; i++) seen[8 + i] = *(int64_t *)parameters[i];
    for (int i = pointers; i < pointers + integers; i++) seen[8 + i] = *(int32_t *)parameters[i];
    launches++;
    return SUCCESS;
}

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    Dl_info here;
    dladdr((void *)&launches, &here);
    void *own = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = own ? dlsym(own, name) : 0;
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, 0);
}
