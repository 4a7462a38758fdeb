package host_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/vm/vmtest"
)

// TestVerdicts: what a VM ran out of is the reason for its end, and beside a limit of time it is said, too.
func TestVerdicts(t *testing.T) {
	const limit = time.Minute
	for name, tt := range map[string]struct {
		exit guest.Exit
		late bool // the program ends only when it is asked to
		code string
		says string
	}{
		"memory":             {exit: guest.Exit{Code: 137, OOM: true}, code: "runner.oom", says: "its VM ran out of memory (256MiB)"},
		"disk":               {exit: guest.Exit{Code: 1, DiskFull: true}, code: "runner.disk_full", says: "its disk was full (1GiB)"},
		"processes":          {exit: guest.Exit{Code: 1, PIDs: true}, code: "runner.pids", says: "as many processes as one of 256MiB may have"},
		"root in memory":     {exit: guest.Exit{Code: 1, RootFull: true}, code: "runner.root_full", says: "half of its memory"},
		"everything":         {exit: guest.Exit{Code: 1, PIDs: true, OOM: true, DiskFull: true}, code: "runner.pids"},
		"no harm":            {exit: guest.Exit{PIDs: true, OOM: true, DiskFull: true}, code: "runner.done"},
		"memory, then disk":  {exit: guest.Exit{Code: 1, OOM: true, DiskFull: true}, code: "runner.oom"},
		"nothing":            {exit: guest.Exit{Code: 1}, code: "runner.exit"},
		"time":               {exit: guest.Exit{Code: 143, Signal: "SIGTERM"}, late: true, code: "runner.time_limit", says: "timed out: longer than 1m0s"},
		"time and processes": {exit: guest.Exit{PIDs: true}, late: true, code: "runner.time_limit", says: "longer than 1m0s; its VM had as many processes"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, &vmtest.Fake{Exec: func(ctx context.Context, _ guest.Command, _ io.Reader, stdout, _ io.Writer) guest.Exit {
					io.WriteString(stdout, "begun\n")
					if tt.late {
						<-ctx.Done()
					}
					return tt.exit
				}})
				w.config.Deadlines.Job = limit
				begin := time.Now()
				res, err := w.host().Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"})
				if res.Reason.Code != tt.code || !strings.Contains(res.Reason.Text, tt.says) {
					t.Errorf("reason %+v; want %s, %q", res.Reason, tt.code, tt.says)
				}
				var fault *flint.Fault
				if tt.late && (!errors.Is(err, flint.ErrTimeout) || !errors.As(err, &fault) || fault.Code != tt.code || fault.Fix == "") {
					t.Errorf("error %v", err)
				}
				if !tt.late && err != nil {
					t.Error(err)
				}
				if took := time.Since(begin); took > limit+20*time.Second {
					t.Errorf("it ended after %s", took)
				}
				if res.Output != "begun\n" {
					t.Errorf("its output is %q", res.Output)
				}
				w.nothingLeft()
			})
		})
	}
}
