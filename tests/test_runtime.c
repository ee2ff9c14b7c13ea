/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The runtime: statuses and their texts, devices and choosing one, programs in memory and in the cache directory.  The
 * kernels are this file's own: its loglin_kernel_source stands in for the library's.
 */
#include "runtime/cache.h"
#include "runtime/device.h"
#include "runtime/environment.h"
#include "runtime/log.h"
#include "runtime/program.h"
#include "runtime/source.h"
#include "runtime/status.h"
#include "support.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static const char value_cl[] = "#ifndef VALUE\n#define VALUE 1\n#endif\n";
static const char fill_cl[] = "__kernel void fill(__global int *out) { out[get_global_id(0)] = VALUE; }\n";
static const char broken_cl[] = "\n\n__kernel void broken(__global int *out) { out[0] = undeclared_name; }\n";

const char *loglin_kernel_source(const char *name, size_t *length) {
    const char *const names[] = {"value.cl", "fill.cl", "broken.cl"};
    const char *const texts[] = {value_cl, fill_cl, broken_cl};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (strcmp(name, names[i]) == 0) {
            *length = strlen(texts[i]);
            return texts[i];
        }
    }
    return NULL;
}

static const char *const fill_files[] = {"value.cl", "fill.cl", NULL};
static const char *const broken_files[] = {"value.cl", "broken.cl", NULL};

/* ---- Statuses --------------------------------------------------------------------------------------------------- */

Test(status, every_own_status_has_its_text) {
#define EXPECT_TEXT(name, value, text)                                                                                 \
    cr_expect_str_eq(loglin_strerror(name), text);                                                                     \
    cr_expect_eq((int)(name), value);
    LOGLIN_STATUS_LIST(EXPECT_TEXT)
#undef EXPECT_TEXT
    cr_expect_str_eq(loglin_strerror(999), "an unknown status");
}

/* The codes of the OpenCL 3.0 specification are -1 to -19 and -30 to -72. */
Test(status, every_opencl_code_has_its_name) {
    for (int code = -72; code <= -1; code++) {
        const bool assigned = code >= -19 || code <= -30;
        cr_expect_eq(strncmp(loglin_strerror(code), "CL_", 3) == 0, assigned, "%d: %s", code, loglin_strerror(code));
    }
    cr_expect_str_eq(loglin_strerror(CL_INVALID_VALUE), "CL_INVALID_VALUE");
    cr_expect_str_eq(loglin_strerror(-1001), "CL_PLATFORM_NOT_FOUND_KHR");
    cr_expect_str_eq(loglin_strerror(-99999), "an OpenCL error without a name");
}

static int fail_elsewhere(void *text) {
    loglin_fail(LOGLIN_IO, "elsewhere");
    snprintf(text, 64, "%s", loglin_last_error());
    return 0;
}

Test(status, the_last_error_belongs_to_its_thread) {
    cr_expect_str_empty(loglin_last_error());
    cr_expect_eq(loglin_fail(LOGLIN_BAD_FILE, "%s is %d", "length", 3), LOGLIN_BAD_FILE);
    char other[64] = "";
    thrd_t thread;
    cr_assert_eq(thrd_create(&thread, fail_elsewhere, other), thrd_success);
    thrd_join(thread, NULL);
    cr_expect_str_eq(other, "elsewhere");
    cr_expect_str_eq(loglin_last_error(), "length is 3");
    loglin_fail(LOGLIN_BAD_FILE, "a file: %s", loglin_last_error());
    cr_expect_str_eq(loglin_last_error(), "a file: length is 3");
}

Test(status, a_long_error_is_cut) {
    char text[10000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    loglin_fail(LOGLIN_INTERNAL, "%s", text);
    cr_expect_gt(strlen(loglin_last_error()), 1000);
    cr_expect_lt(strlen(loglin_last_error()), sizeof text - 1);
}

/* Names in files may hold what moves a terminal's cursor; the log of a compiler keeps its lines. */
Test(status, control_characters_are_replaced) {
    loglin_fail(LOGLIN_BAD_FILE, "%s", "\x1b[2Ja\x7f\r\n\tb\xc3\xa9");
    cr_expect_str_eq(loglin_last_error(), "?[2Ja??\n\tb\xc3\xa9");
}

Test(status, the_version_is_that_of_the_header) {
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", LOGLIN_VERSION_MAJOR, LOGLIN_VERSION_MINOR, LOGLIN_VERSION_PATCH);
    cr_expect_str_eq(loglin_version(), version);
}

/* ---- Devices ---------------------------------------------------------------------------------------------------- */

static int rank_of(cl_device_type type) {
    return type == CL_DEVICE_TYPE_GPU ? 0 : type == CL_DEVICE_TYPE_ACCELERATOR ? 1 : 2;
}

static size_t list_devices(loglin_device_info *infos, size_t capacity) {
    size_t count = 0;
    cr_assert_eq(loglin_list_devices(infos, capacity, &count), LOGLIN_OK, "%s", loglin_last_error());
    return count;
}

static void expect_invalid(loglin_status status, const char *part) {
    cr_expect_eq(status, LOGLIN_INVALID_ARGUMENT);
    cr_expect_not_null(strstr(loglin_last_error(), part), "%s", loglin_last_error());
}

Test(device, the_list_is_complete_and_ordered) {
    setenv("POCL_DEVICES", "basic pthread", 1); /* two devices where PoCL is the driver */
    loglin_device_info infos[64];
    const size_t count = list_devices(infos, 64);
    cr_assert_geq(count, 1);
    cr_assert_leq(count, 64);
    cr_expect_eq(list_devices(NULL, 0), count);
    for (size_t i = 0; i < count; i++) {
        cr_expect_str_not_empty(infos[i].name);
        cr_expect_str_not_empty(infos[i].platform_name);
        cr_expect_str_not_empty(infos[i].driver);
        cr_expect_eq(strncmp(infos[i].version, "OpenCL ", 7), 0);
        cr_expect_gt(infos[i].compute_units, 0);
        cr_expect_gt(infos[i].max_work_group_size, 0);
        cr_expect_geq(infos[i].global_memory, infos[i].max_allocation);
        cr_expect(i == 0 || rank_of(infos[i - 1].type) <= rank_of(infos[i].type));
    }
    loglin_device_info one[2];
    memset(one, 0x5A, sizeof one);
    cr_expect_eq(list_devices(one, 1), count);
    cr_expect_eq(one[0].id, infos[0].id);
    cr_expect_eq(((unsigned char *)&one[1])[0], 0x5A, "nothing is written beyond the capacity");
}

Test(device, lists_refuse_null) {
    size_t count = 0;
    expect_invalid(loglin_list_devices(NULL, 0, NULL), "count");
    expect_invalid(loglin_list_devices(NULL, 3, &count), "capacity is 3");
    expect_invalid(loglin_select_device("0", NULL), "id");
}

Test(device, selection_by_position_name_and_environment) {
    setenv("POCL_DEVICES", "basic pthread", 1);
    loglin_device_info infos[64];
    const size_t count = list_devices(infos, 64);
    cl_device_id id = NULL;
    for (size_t i = 0; i < count; i++) {
        char position[32];
        snprintf(position, sizeof position, "%zu", i);
        cr_expect_eq(loglin_select_device(position, &id), LOGLIN_OK);
        cr_expect_eq(id, infos[i].id);
        setenv("LOGLIN_DEVICE", position, 1);
        cr_expect_eq(loglin_select_device(NULL, &id), LOGLIN_OK);
        cr_expect_eq(id, infos[i].id);
        cr_expect_eq(loglin_select_device("", &id), LOGLIN_OK);
        cr_expect_eq(id, infos[i].id);
        cr_expect_eq(loglin_select_device("0", &id), LOGLIN_OK, "an argument goes before the environment");
        cr_expect_eq(id, infos[0].id);
    }
    unsetenv("LOGLIN_DEVICE");
    cr_expect_eq(loglin_select_device(NULL, &id), LOGLIN_OK);
    cr_expect_eq(id, infos[0].id);

    char part[8];
    snprintf(part, sizeof part, "%.7s", infos[0].platform_name);
    for (char *c = part; *c != '\0'; c++) {
        *c = (char)(*c >= 'a' && *c <= 'z' ? *c - 'a' + 'A' : *c);
    }
    cr_expect_eq(loglin_select_device(part, &id), LOGLIN_OK, "%s: %s", part, loglin_last_error());
    cr_expect_eq(id, infos[0].id);
    cr_expect_eq(loglin_select_device(infos[count - 1].name, &id), LOGLIN_OK);
}

Test(device, a_bad_selector_is_named_with_what_there_is) {
    unsetenv("LOGLIN_DEVICE");
    loglin_device_info info;
    list_devices(&info, 1);
    cl_device_id id = NULL;
    const char *const selectors[] = {"no such device", "4711", "99999999999999999999999999", "-1", " 0"};
    for (size_t i = 0; i < sizeof selectors / sizeof selectors[0]; i++) {
        expect_invalid(loglin_select_device(selectors[i], &id), selectors[i]);
        cr_expect_not_null(strstr(loglin_last_error(), info.name), "%s", loglin_last_error());
        cr_expect_null(id);
    }
    setenv("LOGLIN_DEVICE", "nonsense", 1);
    expect_invalid(loglin_select_device(NULL, &id), "LOGLIN_DEVICE is \"nonsense\"");
}

Test(device, no_platform_is_a_clear_error) {
    setenv("OCL_ICD_VENDORS", "/nonexistent", 1); /* read at this process's first OpenCL call, which comes now */
    cl_uint platforms = 0;
    (void)clGetPlatformIDs(0, NULL, &platforms);
    if (platforms > 0) {
        cr_skip_test("NVIDIA's OpenCL loader does not read OCL_ICD_VENDORS");
    }
    size_t count = 5;
    cr_expect_eq(loglin_list_devices(NULL, 0, &count), LOGLIN_NO_DEVICE);
    cr_expect_eq(count, 0);
    cr_expect_not_null(strstr(loglin_last_error(), "pocl-opencl-icd"), "%s", loglin_last_error());
    cl_device_id id = NULL;
    cr_expect_eq(loglin_select_device(NULL, &id), LOGLIN_NO_DEVICE);
}

Test(device, create_checks_its_arguments) {
    const support_device *opened = support_open();
    loglin_device *device = NULL;
    expect_invalid(loglin_device_create(NULL, opened->id, &device), "context");
    expect_invalid(loglin_device_create(opened->context, NULL, &device), "id");
    expect_invalid(loglin_device_create(opened->context, opened->id, NULL), "device");
    loglin_device_destroy(NULL);
}

Test(device, create_refuses_a_device_of_another_context) {
    const support_device *opened = support_open();
    const cl_device_partition_property halves[] = {CL_DEVICE_PARTITION_BY_COUNTS, 1,
                                                   CL_DEVICE_PARTITION_BY_COUNTS_LIST_END, 0};
    cl_device_id part = NULL;
    if (clCreateSubDevices(opened->id, halves, 1, &part, NULL) != CL_SUCCESS) {
        cr_skip_test("the device cannot be partitioned");
    }
    loglin_device *device = NULL;
    expect_invalid(loglin_device_create(opened->context, part, &device), "not one of the context's 1");
    cr_expect_null(device);
    clReleaseDevice(part);
}

Test(device, a_device_knows_itself_and_counts_its_owners) {
    const support_device *opened = support_open();
    loglin_device *device = NULL;
    cr_assert_eq(loglin_device_create(opened->context, opened->id, &device), LOGLIN_OK, "%s", loglin_last_error());
    cr_expect_eq(device->info.id, opened->id);
    cr_expect_eq(device->is_cpu, device->info.type == CL_DEVICE_TYPE_CPU);
    loglin_device_retain(device);
    loglin_device_destroy(device);
    cr_expect_eq(device->context, opened->context, "the second owner keeps it alive");
    loglin_device_release(device);
}

/* ---- Where the cache is ----------------------------------------------------------------------------------------- */

static void expect_directory(const char *own, const char *xdg, const char *home, const char *expected) {
    const char *const names[] = {"LOGLIN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"};
    const char *const values[] = {own, xdg, home};
    for (size_t i = 0; i < 3; i++) {
        if (values[i] != NULL) {
            setenv(names[i], values[i], 1);
        } else {
            unsetenv(names[i]);
        }
    }
    char *directory = loglin_cache_directory();
    if (expected != NULL) {
        cr_expect_str_eq(directory, expected);
    } else {
        cr_expect_null(directory);
    }
    free(directory);
}

Test(cache, the_directory_follows_the_environment) {
    expect_directory("/own", "/xdg", "/home/x", "/own");
    expect_directory("", "/xdg", "/home/x", NULL);
    expect_directory(NULL, "/xdg", "/home/x", "/xdg/loglin");
    expect_directory(NULL, "relative", "/home/x", "/home/x/.cache/loglin");
    expect_directory(NULL, "", "/home/x", "/home/x/.cache/loglin");
    expect_directory(NULL, NULL, "/home/x", "/home/x/.cache/loglin");
    expect_directory(NULL, NULL, NULL, NULL);
}

/* ---- Programs --------------------------------------------------------------------------------------------------- */

/* The test's cache directory; it does not exist at first. */
static char directory[64];
static char parent[32];

static void use_fresh_directory(void) {
    strcpy(parent, "/tmp/loglin-runtime-XXXXXX");
    cr_assert_not_null(mkdtemp(parent));
    snprintf(directory, sizeof directory, "%s/deep/cache", parent);
    setenv("LOGLIN_CACHE_DIR", directory, 1);
}

/* The number of files in the directory whose name ends so; *path (may be NULL) receives the path of one. */
static size_t find_files(const char *ending, char *path, size_t capacity) {
    size_t count = 0;
    DIR *entries = opendir(directory);
    if (entries == NULL) {
        return 0;
    }
    for (const struct dirent *entry = readdir(entries); entry != NULL; entry = readdir(entries)) {
        const size_t length = strlen(entry->d_name);
        if (length > strlen(ending) && strcmp(entry->d_name + length - strlen(ending), ending) == 0) {
            count++;
            if (path != NULL) {
                snprintf(path, capacity, "%s/%s", directory, entry->d_name);
            }
        }
    }
    closedir(entries);
    return count;
}

static void remove_directory(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -r '%s'", parent);
    cr_expect_eq(system(command), 0);
}

static loglin_device *create_device(void) {
    const support_device *opened = support_open();
    loglin_device *device = NULL;
    cr_assert_eq(loglin_device_create(opened->context, opened->id, &device), LOGLIN_OK, "%s", loglin_last_error());
    return device;
}

/* What the program's kernel writes. */
static int run_fill(cl_program program) {
    const support_device *opened = support_open();
    cl_int result = 0;
    cl_kernel kernel = clCreateKernel(program, "fill", NULL);
    cl_mem out = clCreateBuffer(opened->context, CL_MEM_READ_WRITE, sizeof result, NULL, NULL);
    const size_t one = 1;
    support_require(clSetKernelArg(kernel, 0, sizeof out, &out), "clSetKernelArg");
    support_require(clEnqueueNDRangeKernel(opened->queue, kernel, 1, NULL, &one, &one, 0, NULL, NULL), "fill");
    support_require(clEnqueueReadBuffer(opened->queue, out, CL_TRUE, 0, sizeof result, &result, 0, NULL, NULL), "read");
    clReleaseMemObject(out);
    clReleaseKernel(kernel);
    return result;
}

/* Gets the program on a new device, which knows none yet, and runs it. */
static void expect_fill(const char *options, int expected) {
    loglin_device *device = create_device();
    cl_program program = NULL;
    cr_assert_eq(loglin_program_get(device, fill_files, options, &program), LOGLIN_OK, "%s", loglin_last_error());
    cr_expect_eq(run_fill(program), expected);
    loglin_device_destroy(device);
}

static ino_t inode_of(const char *path) {
    struct stat status;
    cr_assert_eq(stat(path, &status), 0);
    return status.st_ino;
}

/* A device's next program is read from the entry, which stays the same file, or (miss) replaces it by a good one. */
static void expect_use_of_entry(const char *path, bool hit) {
    char kept[160]; /* a second name keeps the inode from being used again */
    snprintf(kept, sizeof kept, "%s-kept", path);
    cr_assert_eq(link(path, kept), 0);
    expect_fill("-DVALUE=5", 5);
    cr_expect_eq(inode_of(path) == inode_of(kept), hit);
    unlink(kept);
    cr_expect_eq(find_files(".program", NULL, 0), 1);
}

/* The one entry that there is, made anew. */
static void make_entry(char *path, size_t capacity) {
    expect_fill("-DVALUE=5", 5);
    cr_assert_eq(find_files(".program", path, capacity), 1);
}

static unsigned char *read_file(const char *path, size_t *size) {
    struct stat status;
    cr_assert_eq(stat(path, &status), 0);
    *size = (size_t)status.st_size;
    unsigned char *bytes = support_alloc(*size, 1);
    FILE *file = fopen(path, "rb");
    cr_assert_not_null(file);
    cr_assert_eq(fread(bytes, 1, *size, file), *size);
    fclose(file);
    return bytes;
}

static void write_file(const char *path, const unsigned char *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    cr_assert_not_null(file);
    cr_assert_eq(fwrite(bytes, 1, size, file), size);
    fclose(file);
}

Test(program, is_kept_in_memory) {
    setenv("LOGLIN_CACHE_DIR", "", 1);
    loglin_device *device = create_device();
    cl_program first = NULL;
    cl_program second = NULL;
    cl_program other = NULL;
    cr_assert_eq(loglin_program_get(device, fill_files, "", &first), LOGLIN_OK, "%s", loglin_last_error());
    cr_assert_eq(loglin_program_get(device, fill_files, "", &second), LOGLIN_OK);
    cr_assert_eq(loglin_program_get(device, fill_files, "-DVALUE=2", &other), LOGLIN_OK);
    cr_expect_eq(first, second);
    cr_expect_neq(first, other);
    cr_expect_eq(run_fill(first), 1);
    cr_expect_eq(run_fill(other), 2);
    loglin_device_destroy(device);
}

typedef struct getter {
    loglin_device *device;
    loglin_status status;
    cl_program program;
} getter;

static int get_in_thread(void *argument) {
    getter *mine = argument;
    mine->status = loglin_program_get(mine->device, fill_files, "-DVALUE=3", &mine->program);
    return 0;
}

Test(program, threads_get_the_same_one) {
    setenv("LOGLIN_CACHE_DIR", "", 1);
    loglin_device *device = create_device();
    enum { THREADS = 4 };
    getter getters[THREADS];
    thrd_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++) {
        getters[i] = (getter){.device = device};
        cr_assert_eq(thrd_create(&threads[i], get_in_thread, &getters[i]), thrd_success);
    }
    for (size_t i = 0; i < THREADS; i++) {
        thrd_join(threads[i], NULL);
        cr_expect_eq(getters[i].status, LOGLIN_OK);
        cr_expect_eq(getters[i].program, getters[0].program);
    }
    loglin_device_destroy(device);
}

Test(program, a_build_failure_tells_the_compilers_error) {
    setenv("LOGLIN_CACHE_DIR", "", 1);
    loglin_device *device = create_device();
    cl_program program = NULL;
    for (int again = 0; again < 2; again++) {
        cr_expect_eq(loglin_program_get(device, broken_files, "-DVALUE=4", &program), LOGLIN_BUILD_FAILED);
        cr_expect_not_null(strstr(loglin_last_error(), "error"), "%s", loglin_last_error());
        cr_expect_not_null(strstr(loglin_last_error(), "undeclared_name"), "%s", loglin_last_error());
        cr_expect_not_null(strstr(loglin_last_error(), "broken.cl"), "%s", loglin_last_error());
        cr_expect_null(strchr(loglin_last_error(), '\n'));
        cr_expect_null(program);
    }
    cr_expect_eq(loglin_program_get(device, fill_files, "", &program), LOGLIN_OK, "the device can still build");
    const char *const missing[] = {"missing.cl", NULL};
    cr_expect_eq(loglin_program_get(device, missing, "", &program), LOGLIN_INTERNAL);
    loglin_device_destroy(device);
}

Test(program, the_environment_adds_build_options) {
    setenv("LOGLIN_CACHE_DIR", "", 1);
    setenv("LOGLIN_BUILD_OPTIONS", "-DVALUE=11", 1);
    expect_fill("", 11);
    setenv("LOGLIN_BUILD_OPTIONS", "-DVALUE=?", 1);
    loglin_device *device = create_device();
    cl_program program = NULL;
    cr_expect_eq(loglin_program_get(device, fill_files, "", &program), LOGLIN_BUILD_FAILED);
    cr_expect_not_null(strstr(loglin_last_error(), "-DVALUE=?"), "%s", loglin_last_error());
    loglin_device_destroy(device);
}

/* ---- The cache directory ---------------------------------------------------------------------------------------- */

Test(cache, a_stored_program_is_used) {
    use_fresh_directory();
    char path[128];
    make_entry(path, sizeof path);
    struct stat status;
    cr_assert_eq(stat(directory, &status), 0);
    cr_expect_eq(status.st_mode & 0777, 0700);
    cr_assert_eq(stat(path, &status), 0);
    cr_expect_eq(status.st_mode & 0777, 0600);
    expect_use_of_entry(path, true);
    expect_fill("-DVALUE=6", 6);
    cr_expect_eq(find_files(".program", NULL, 0), 2, "other options are another entry");
    remove_directory();
}

Test(cache, an_empty_variable_switches_it_off) {
    use_fresh_directory();
    setenv("LOGLIN_CACHE_DIR", "", 1);
    expect_fill("", 1);
    cr_expect_eq(access(directory, F_OK), -1);
    remove_directory();
}

Test(cache, a_truncated_entry_is_a_miss) {
    use_fresh_directory();
    char path[128];
    make_entry(path, sizeof path);
    struct stat status;
    cr_assert_eq(stat(path, &status), 0);
    const off_t lengths[] = {0, 7, 40, 48, 100, status.st_size / 2, status.st_size - 1};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        cr_assert_eq(truncate(path, lengths[i]), 0);
        expect_use_of_entry(path, false);
        expect_use_of_entry(path, true);
    }
    cr_assert_eq(truncate(path, status.st_size + 1), 0);
    expect_use_of_entry(path, false);
    remove_directory();
}

Test(cache, a_damaged_entry_is_a_miss) {
    use_fresh_directory();
    char path[128];
    make_entry(path, sizeof path);
    size_t size = 0;
    unsigned char *good = read_file(path, &size);
    /* magic, version, key size (small and huge), data size (small and huge), checksum, key, data */
    const size_t places[] = {0, 8, 16, 23, 24, 31, 32, 60, size - 1};
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        good[places[i]] ^= 0xFF;
        write_file(path, good, size);
        good[places[i]] ^= 0xFF;
        expect_use_of_entry(path, false);
    }
    free(good);
    remove_directory();
}

Test(cache, a_foreign_entry_is_a_miss) {
    use_fresh_directory();
    char path[128];
    make_entry(path, sizeof path);
    size_t size = 0;
    unsigned char *entry = read_file(path, &size);
    uint64_t key_size = 0;
    memcpy(&key_size, entry + 16, sizeof key_size);
    char *key = support_alloc((size_t)key_size + 1, 1);
    memcpy(key, entry + 48, (size_t)key_size);

    /* Another key's entry under this name, as if the hashes were the same. */
    char *driver = strstr(key, "\ndriver ");
    cr_assert_not_null(driver);
    memcpy(entry + 48 + (driver - key), "\nDRIVER ", 8);
    write_file(path, entry, size);
    expect_use_of_entry(path, false);

    /* A whole entry whose data the driver does not take. */
    loglin_cache_store(directory, key, "not a program", 13);
    expect_use_of_entry(path, false);

    /* Not a file at all. */
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(mkfifo(path, 0600), 0);
    expect_use_of_entry(path, false);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(mkdir(path, 0700), 0);
    expect_fill("-DVALUE=5", 5);
    cr_expect_eq(find_files("-XXXXXX", NULL, 0), 0);
    free(key);
    free(entry);
    remove_directory();
}

Test(cache, an_entry_that_others_may_write_is_a_miss) {
    use_fresh_directory();
    char path[128];
    make_entry(path, sizeof path);
    static const mode_t modes[] = {0620, 0602, 0666};
    for (size_t i = 0; i < sizeof modes / sizeof modes[0]; i++) {
        cr_assert_eq(chmod(path, modes[i]), 0);
        expect_use_of_entry(path, false);
        expect_use_of_entry(path, true);
    }
    cr_assert_eq(chmod(path, 0644), 0);
    expect_use_of_entry(path, true);
    remove_directory();
}

/* Compiles where the variable names directories that are none; `lines` receives what is logged, up to 1023 characters. */
static void log_unusable(const char *variable, const char *level, char lines[1024]) {
    use_fresh_directory();
    unsetenv("LOGLIN_CACHE_DIR");
    setenv("LOGLIN_LOG", level, 1);
    char messages[64];
    snprintf(messages, sizeof messages, "%s/pocl", parent);
    setenv("POCL_CACHE_DIR", messages, 0); /* PoCL ends the process where its own, by the same variable, is of no use */
    snprintf(messages, sizeof messages, "%s/messages", parent);
    fflush(stderr);
    const int saved = dup(STDERR_FILENO);
    const int file = open(messages, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    cr_assert(saved >= 0 && file >= 0);
    dup2(file, STDERR_FILENO);
    const char *const directories[] = {"/dev/null/cache", "/proc/loglin"};
    for (size_t i = 0; i < 2; i++) {
        setenv(variable, directories[i], 1);
        expect_fill("-DVALUE=8", 8);
        expect_fill("-DVALUE=9", 9);
    }
    dup2(saved, STDERR_FILENO);
    close(saved);
    close(file);
    size_t size = 0;
    unsigned char *text = read_file(messages, &size);
    snprintf(lines, 1024, "%.*s", (int)size, (const char *)text);
    free(text);
    remove_directory();
}

/* It is told once, with the text in its line. */
static void expect_told_once(const char *variable, const char *level, const char *text) {
    char lines[1024];
    log_unusable(variable, level, lines);
    cr_expect(strstr(lines, text) != NULL, "%s", lines);
    cr_expect_eq(strchr(lines, '\n'), lines + strlen(lines) - 1, "%s", lines);
}

/* Who has named it is warned. */
Test(cache, an_unusable_directory_only_disables_it) {
    expect_told_once("LOGLIN_CACHE_DIR", "warn", "LOGLIN_CACHE_DIR, /dev/null/cache: ");
}

/* A home that cannot be written to is usual in a container: only who asks is told. */
Test(cache, an_unusable_default_directory_is_no_reason_to_warn) {
    char lines[1024];
    log_unusable("XDG_CACHE_HOME", "warn", lines);
    cr_expect_str_empty(lines);
}

Test(cache, an_unusable_default_directory_is_told_at_info) {
    expect_told_once("XDG_CACHE_HOME", "info", "/dev/null/cache/loglin: ");
}

Test(cache, processes_may_use_it_at_once) {
    use_fresh_directory();
    enum { PROCESSES = 3 };
    pid_t children[PROCESSES];
    for (size_t i = 0; i < PROCESSES;
         i++) { /* before this process's first OpenCL call: drivers do not survive a fork */
        children[i] = fork();
        cr_assert_geq(children[i], 0);
        if (children[i] == 0) {
            const support_device *opened = support_open();
            bool good = true;
            for (int round = 0; round < 2; round++) {
                loglin_device *device = NULL;
                cl_program program = NULL;
                good = good && loglin_device_create(opened->context, opened->id, &device) == LOGLIN_OK &&
                       loglin_program_get(device, fill_files, "-DVALUE=5", &program) == LOGLIN_OK &&
                       run_fill(program) == 5;
                loglin_device_destroy(device);
            }
            _exit(good ? 0 : 1);
        }
    }
    for (size_t i = 0; i < PROCESSES; i++) {
        int status = -1;
        cr_assert_eq(waitpid(children[i], &status, 0), children[i]);
        cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    char path[128];
    cr_expect_eq(find_files("", NULL, 0) - 2, 1, "only the entry, no temporary file, beside . and ..");
    cr_assert_eq(find_files(".program", path, sizeof path), 1);
    expect_use_of_entry(path, true);
    remove_directory();
}
