/* Ship one CNI call to the Towpath agent and copy its answer: the compiled twin of towpath_cni.py, ten times as quick.
 *
 * What one does, the other does, and one suite of tests holds them to it; the reasons are told there. No library but
 * libc; memory is never given back, since the process lives for a millisecond.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef SOCKET /* both are given by `towpath cni install` */
#define SOCKET "/run/towpath/agent.sock"
#endif
#ifndef PYTHON
#define PYTHON "/opt/towpath/venv/bin/python3"
#endif
#define LISTING "0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"
#define NEWEST "1.1.0"

extern char **environ;
static const char MARK[] __attribute__((used)) = "towpath-cni-executable 1";

struct text { /* bytes that grow; always ended by a NUL that is not counted */
    char *at;
    size_t len, room;
};

static struct text input;
static const char *name, *path;

static void put(struct text *t, const void *bytes, size_t len)
{
    if (t->len + len + 1 > t->room) {
        t->room = (t->len + len + 1) * 2;
        if (!(t->at = realloc(t->at, t->room)))
            _exit(1);
    }
    if (len)
        memcpy(t->at + t->len, bytes, len);
    t->at[t->len += len] = 0;
}

static void puts_(struct text *t, const char *words) { put(t, words, strlen(words)); }

/* Text that needs no escape in JSON or in a header: '?' for all but printable ASCII without quote and backslash. */
static void plain(struct text *t, const char *words)
{
    for (; *words; words++)
        put(t, *words < 32 || *words > 126 || *words == '"' || *words == '\\' ? "?" : words, 1);
}

static int ready(int fd, short event, int limit)
{
    struct pollfd poller = {fd, event, 0};
    return poll(&poller, 1, limit) > 0;
}

static void put_out(int fd, const char *bytes, size_t len)
{
    while (len) {
        ssize_t n = write(fd, bytes, len);
        if (n >= 0) {
            bytes += n;
            len -= (size_t)n;
        } else if (errno == EAGAIN) {
            ready(fd, POLLOUT, -1);
        } else if (errno != EINTR) {
            _exit(1); /* nobody reads our stdout any more */
        }
    }
}

/* The first cniVersion in the input if it is one of ours, else NULL. */
static const char *asked(void)
{
    static char found[8];
    const char *at = input.len ? memmem(input.at, input.len, "\"cniVersion\"", 12) : NULL;
    if (!at)
        return NULL;
    at += 12;
    at += strspn(at, " \t\r\n");
    if (*at++ != ':')
        return NULL;
    at += strspn(at, " \t\r\n");
    if (*at++ != '"' || strcspn(at, "\", ") != 5 || at[5] != '"')
        return NULL;
    memcpy(found, at, 5); /* five characters without comma or space: a whole version of the list, if found there */
    return strstr(LISTING, found) ? found : NULL;
}

static int fail(int code, const char *msg, const char *where, const char *details, const char *why)
{
    struct text out = {0};
    char number[48];
    puts_(&out, "{\"cniVersion\":\"");
    puts_(&out, asked() ? asked() : NEWEST);
    snprintf(number, sizeof number, "\",\"code\":%d,\"msg\":\"", code);
    puts_(&out, number);
    plain(&out, msg);
    plain(&out, where);
    puts_(&out, "\",\"details\":\"");
    plain(&out, details);
    plain(&out, why);
    puts_(&out, "\"}\n");
    put_out(1, out.at, out.len);
    return 1;
}

static void answer_version(void)
{
    struct text out = {0};
    const char *c;
    char chunk[4096];
    ssize_t n;
    for (int i = 0; i < 64 && !asked() && ready(0, POLLIN, 10) && (n = read(0, chunk, sizeof chunk)) > 0; i++)
        put(&input, chunk, (size_t)n);
    puts_(&out, "{\"cniVersion\":\"");
    puts_(&out, asked() ? asked() : NEWEST);
    puts_(&out, "\",\"supportedVersions\":[\"");
    for (c = LISTING; *c; c++)
        if (*c == ',')
            puts_(&out, "\",\"");
        else if (*c != ' ')
            put(&out, c, 1);
    puts_(&out, "\"]}\n");
    put_out(1, out.at, out.len);
}

static int read_all(void)
{
    static char chunk[1 << 16];
    ssize_t n;
    while ((n = read(0, chunk, sizeof chunk)) != 0)
        if (n > 0)
            put(&input, chunk, (size_t)n);
        else if (errno == EAGAIN)
            ready(0, POLLIN, -1);
        else if (errno != EINTR)
            return -1;
    return 0;
}

/* CNI_* and PATH as KEY=VALUE, each ended by NUL, one more NUL, then stdin as it came. */
static struct text encode(void)
{
    struct text body = {0}, request = {0};
    char number[64];
    for (char **e = environ; *e; e++)
        if ((!strncmp(*e, "CNI_", 4) && strchr(*e, '=')) || !strncmp(*e, "PATH=", 5))
            put(&body, *e, strlen(*e) + 1);
    put(&body, "", 1);
    puts_(&request, "POST /cni HTTP/1.1\r\nHost: towpath\r\nConnection: close\r\nX-Plugin: ");
    plain(&request, name);
    snprintf(number, sizeof number, "\r\nContent-Length: %zu\r\n\r\n", body.len + input.len);
    puts_(&request, number);
    put(&request, body.at, body.len);
    put(&request, input.at, input.len);
    return request;
}

/* A connection to the agent, or -1 where nobody answered for 2 s (40 pauses of 50 ms). */
static int dial(void)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    struct timespec pause = {0, 50 * 1000 * 1000};
    int fd, left, done;
    if (strlen(path) >= sizeof to.sun_path)
        return -1;
    strcpy(to.sun_path, path);
    for (left = 40; left >= 0; left--) {
        if ((fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) >= 0) {
            while ((done = connect(fd, (struct sockaddr *)&to, sizeof to)) < 0 && errno == EINTR)
                ;
            if (!done)
                return fd;
            close(fd);
        }
        if (left)
            nanosleep(&pause, NULL);
    }
    return -1;
}

/* The number in a header field, -1 where there is none. `head` ends with NUL. */
static long field(const char *head, const char *key)
{
    const char *at = strcasestr(head, key);
    char *end;
    long value;
    if (!at)
        return -1;
    at += strlen(key);
    at += strspn(at, " \t");
    value = strtol(at, &end, 10);
    end += strspn(end, " \t");
    return *at < '0' || *at > '9' || (*end && *end != '\r') ? -1 : value;
}

/* Send the request and fill `reply`; the body's place in it, NULL where the agent went away before the reply's end.
 * The head's last CRLF becomes a NUL. */
static char *exchange(int fd, const struct text *request, struct text *reply)
{
    static char chunk[1 << 16];
    size_t sent = 0, head = 0;
    ssize_t n = 0;
    reply->len = 0;
    while (sent < request->len && ((n = send(fd, request->at + sent, request->len - sent, 0)) >= 0 || errno == EINTR))
        sent += n > 0 ? (size_t)n : 0; /* refused half-way: the reply that says why may be waiting to be read */
    while (!head || (long)(reply->len - head) < field(reply->at, "\r\nContent-Length:")) {
        while ((n = recv(fd, chunk, sizeof chunk, 0)) < 0 && errno == EINTR)
            ;
        if (n <= 0)
            return NULL;
        put(reply, chunk, (size_t)n);
        if (!head) {
            char *end = memmem(reply->at, reply->len, "\r\n\r\n", 4);
            if (end) {
                *end = 0;
                head = (size_t)(end - reply->at) + 4;
            }
        }
    }
    return reply->at + head;
}

/* Become the interpreter that does the work alone, stdin given again; without one, say how to start the agent. */
static int stand_in(void)
{
    char *const argv[] = {PYTHON, "-I", "-m", "towpath.cni_once", NULL};
    const char *command = getenv("CNI_COMMAND");
    struct text why = {0};
    int again = memfd_create("stdin", MFD_CLOEXEC);
    if (again < 0)
        return fail(5, "the call could not be passed on", "", strerror(errno), "");
    put_out(again, input.at, input.len);
    if (lseek(again, 0, SEEK_SET) || dup2(again, 0) || setenv("TOWPATH_PLUGIN", name, 1))
        return fail(5, "the call could not be passed on", "", strerror(errno), "");
    execv(PYTHON, argv);
    puts_(&why, PYTHON ": ");
    puts_(&why, strerror(errno));
    /* CNI spec, "STATUS": 50 = no ADD can be served */
    return fail(command && !strcmp(command, "STATUS") ? 50 : 11, "the Towpath agent is not running at ", path,
                "start it: systemctl start towpath or: towpath agent; ", why.at);
}

static int forward(void)
{
    struct text request = encode(), reply = {0};
    for (int i = 0; i < 2; i++) { /* once more where the agent died over the first: it may be back already */
        char *body;
        int fd = dial();
        if (fd < 0)
            break;
        if ((body = exchange(fd, &request, &reply))) {
            long status = field(reply.at, "\r\nX-Exit:");
            if (status < 0 || status > 255) {
                reply.at[strcspn(reply.at, "\r")] = 0;
                return fail(999, "no CNI answer from the Towpath agent at ", path, reply.at, "");
            }
            put_out(1, body, reply.len - (size_t)(body - reply.at));
            return (int)status;
        }
    }
    return stand_in();
}

int main(int argc, char **argv)
{
    const char *command = getenv("CNI_COMMAND"), *run = (const char *)getauxval(AT_EXECFN);
    struct text about = {0};
    int fd;
    while ((fd = open("/dev/null", O_RDWR)) >= 0 && fd < 3)
        ;
    close(fd);
    signal(SIGPIPE, SIG_IGN);
    if (!run)
        run = argc ? argv[0] : "";
    name = strrchr(run, '/') ? strrchr(run, '/') + 1 : run;
    path = getenv("TOWPATH_SOCKET");
    if (!path || !*path)
        path = SOCKET;
    if (!command || !*command) {
        puts_(&about, "Towpath CNI plugin ");
        puts_(&about, name);
        puts_(&about, ": forwards to the Towpath agent\nCNI protocol versions supported: " LISTING "\n");
        put_out(2, about.at, about.len);
        return 0;
    }
    if (!strcmp(command, "VERSION")) {
        answer_version();
        return 0;
    }
    if (read_all() < 0)
        return fail(5, "the call could not be passed on", "", strerror(errno), "");
    return forward();
}
