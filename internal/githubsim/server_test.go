package githubsim

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/actions/scaleset"
	"github.com/google/go-cmp/cmp"
)

func submit(t *testing.T, r *rig, src string) *Run {
	t.Helper()
	run, err := r.Submit(mustParse(t, src), Trigger{Event: "push"})
	if err != nil {
		t.Fatal(err)
	}
	return run
}

func TestOfficialListenerThroughWholeJob(t *testing.T) {
	for _, acquire := range []bool{false, true} {
		t.Run(fmt.Sprintf("acquire=%v", acquire), func(t *testing.T) {
			r := newRig(t, Config{Acquire: acquire})
			f := r.runFleet("flint", 2, runFake(t, "succeeded"))
			run := submit(t, r, "on: push\njobs:\n  a:\n    runs-on: flint\n    outputs: { made: x }\n    steps: [{run: one, name: first}, {run: two, name: second}]\n  b: { runs-on: flint, needs: a, steps: [{run: x, name: third}], name: \"b\" }\n")
			r.waitRun(run, Success)
			f.wg.Wait()
			var got []string
			for _, e := range r.seen() {
				if e.Job == "a" && e.RunID == run.ID() {
					got = append(got, strings.TrimSpace(e.Kind.String()+" "+e.Step+" "+string(e.Conclusion)+e.Line))
				}
			}
			// Lines come by their own connection: only their order among themselves is certain.
			var lines, rest []string
			for _, g := range got {
				if strings.HasPrefix(g, "log line") {
					lines = append(lines, g)
				} else {
					rest = append(rest, g)
				}
			}
			wantRest := []string{
				"job queued", "job assigned", "job started", "step started first", "step started second",
				"step completed first success", "step completed second success", "job completed  success",
			}
			wantLines := []string{
				"log line first live first", "log line first \x1b[31mred\x1b[0m", "log line second live second", "log line second \x1b[31mred\x1b[0m",
			}
			if d := cmp.Diff(wantRest, rest) + cmp.Diff(wantLines, lines); d != "" {
				t.Errorf("events (-want +got):\n%s", d)
			}
			if got[len(got)-1] != "job completed  success" {
				t.Errorf("something came after the job was completed: %q", got)
			}
			jobs := run.Jobs()
			if jobs[0].Log != "whole first\nwhole second\n" || jobs[0].Status != "completed" || jobs[0].Runner == "" {
				t.Errorf("job a is %+v", jobs[0])
			}
			if left := r.Inventory(); len(left.Runners) != 0 || left.OpenJobs != 0 {
				t.Errorf("left: %+v", left)
			}
		})
	}
}

func TestTenJobsTwoAtATime(t *testing.T) {
	r := newRig(t, Config{})
	f := r.runFleet("flint", 2, runFake(t, "succeeded"))
	run := submit(t, r, "on: push\njobs:\n  a:\n    runs-on: flint\n    strategy: { matrix: { n: [1,2,3,4,5,6,7,8,9,10] } }\n    steps: [{run: x}]\n")
	r.waitRun(run, Success)
	f.wg.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.launched != 10 || f.peak > 2 || len(r.Runners()) != 0 {
		t.Errorf("launched %d runners, %d at once, %d registrations left", f.launched, f.peak, len(r.Runners()))
	}
}

func TestFailureSkipsWhatNeedsIt(t *testing.T) {
	r := newRig(t, Config{})
	f := r.runFleet("flint", 5, func(_ context.Context, _, jit string) {
		x := decodeJIT(t, jit)
		x.online()
		x.acquire()
		conclusion := "succeeded"
		if x.job.JobDisplayName == "bad" || x.job.JobDisplayName == "may" {
			conclusion = "failed"
		}
		x.want(200, x.complete(conclusion), "complete")
	})
	run := submit(t, r, `
on: push
jobs:
  bad: { runs-on: flint, steps: [{ run: x }] }
  may: { runs-on: flint, continue-on-error: true, steps: [{ run: x }] }
  after: { runs-on: flint, needs: bad, steps: [{ run: x }] }
  deeper: { runs-on: flint, needs: after, steps: [{ run: x }] }
  mended: { runs-on: flint, needs: may, steps: [{ run: x }] }
  always: { runs-on: flint, needs: [bad, after], if: always(), steps: [{ run: x }] }
  onfail: { runs-on: flint, needs: deeper, if: "${{ failure() && needs.deeper.result == 'skipped' }}", steps: [{ run: x }] }
  notnow: { runs-on: flint, if: github.event_name == 'schedule', steps: [{ run: x }] }
`)
	r.waitRun(run, Failure)
	f.wg.Wait()
	got := map[string]Conclusion{}
	for _, j := range run.Jobs() {
		got[j.Name] = j.Conclusion
	}
	want := map[string]Conclusion{
		"bad": Failure, "may": Failure, "after": Skipped, "deeper": Skipped, "mended": Success, "always": Success, "onfail": Success, "notnow": Skipped,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("conclusions (-want +got):\n%s", d)
	}
}

func TestFailFastAndMaxParallel(t *testing.T) {
	r := newRig(t, Config{})
	f := r.runFleet("flint", 5, func(_ context.Context, _, jit string) {
		x := decodeJIT(t, jit)
		x.online()
		x.acquire()
		x.want(200, x.complete("failed"), "complete")
	})
	run := submit(t, r, "on: push\njobs:\n  a:\n    runs-on: flint\n    strategy: { max-parallel: 1, matrix: { n: [1, 2, 3] } }\n    steps: [{run: x}]\n")
	r.waitRun(run, Failure)
	f.wg.Wait()
	var got []Conclusion
	for _, j := range run.Jobs() {
		got = append(got, j.Conclusion)
	}
	if d := cmp.Diff([]Conclusion{Failure, Cancelled, Cancelled}, got); d != "" {
		t.Errorf("conclusions (-want +got):\n%s", d)
	}
	if f.launched != 1 {
		t.Errorf("%d runners for one job that ran", f.launched)
	}
}

func TestCancel(t *testing.T) {
	r := newRig(t, Config{})
	f := r.runFleet("flint", 5, func(_ context.Context, _, jit string) {
		x := decodeJIT(t, jit)
		x.online()
		x.acquire()
		if x.job.JobDisplayName == "cleanup" {
			x.want(200, x.complete("succeeded"), "complete")
			return
		}
		for {
			kind, body := x.poll()
			if kind == "JobCancellation" && body["jobId"] == x.job.JobID {
				break
			}
		}
		x.want(200, x.complete("canceled"), "complete")
	})
	run := submit(t, r, `
on: push
jobs:
  long: { runs-on: flint, steps: [{ run: x }] }
  later: { runs-on: flint, needs: long, steps: [{ run: x }] }
  cleanup: { runs-on: flint, needs: long, if: cancelled(), steps: [{ run: x }] }
  nobody: { runs-on: no-such-label, steps: [{ run: x }] }
`)
	r.untilKind(JobStarted)
	run.Cancel()
	run.Cancel()
	r.waitRun(run, Cancelled)
	f.wg.Wait()
	var got []string
	for _, j := range run.Jobs() {
		got = append(got, j.Name+" "+string(j.Conclusion))
	}
	if d := cmp.Diff([]string{"long cancelled", "later cancelled", "cleanup success", "nobody cancelled"}, got); d != "" {
		t.Errorf("conclusions (-want +got):\n%s", d)
	}
}

const oneJob = "on: push\njobs:\n  a: { runs-on: flint, steps: [{run: x, name: s}] }\n"

// session opens a session of a scale set and returns both.
func (r *rig) session(name string) (*scaleset.Client, *scaleset.RunnerScaleSet, *scaleset.MessageSessionClient) {
	r.t.Helper()
	c := r.client()
	set := r.scaleSet(c, name)
	m, err := c.MessageSessionClient(r.t.Context(), set.ID, "test")
	if err != nil {
		r.t.Fatal(err)
	}
	return c, set, m
}

func (r *rig) jit(c *scaleset.Client, set int, name string) (*fakeRunner, int) {
	r.t.Helper()
	j, err := c.GenerateJitRunnerConfig(r.t.Context(), &scaleset.RunnerScaleSetJitRunnerSetting{Name: name}, set)
	if err != nil {
		r.t.Fatal(err)
	}
	return decodeJIT(r.t, j.EncodedJITConfig), j.Runner.ID
}

func message(t *testing.T, m *scaleset.MessageSessionClient, capacity int) *scaleset.RunnerScaleSetMessage {
	t.Helper()
	msg, err := m.GetMessage(t.Context(), 0, capacity)
	if err != nil {
		t.Fatal(err)
	}
	return msg
}

func TestMessagesRepeatUntilDeletedAndCapacityGates(t *testing.T) {
	r := newRig(t, Config{Poll: 50 * time.Millisecond})
	c, set, m := r.session("flint")
	for range 3 {
		submit(t, r, oneJob)
	}
	if msg := message(t, m, 0); msg != nil {
		t.Fatalf("a poll with capacity 0 got %+v", msg)
	}
	first := message(t, m, 2)
	if first == nil || len(first.JobAssignedMessages) != 2 || first.Statistics.TotalAssignedJobs != 2 || first.JobAssignedMessages[0].RunnerRequestID != 0 {
		t.Fatalf("a poll with capacity 2 got %+v", first)
	}
	if again := message(t, m, 2); again == nil || again.MessageID != first.MessageID {
		t.Fatalf("the message was not repeated: %+v", again)
	}
	// A new session gets what was not acknowledged.
	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	m2, err := c.MessageSessionClient(t.Context(), set.ID, "test")
	if err != nil {
		t.Fatal(err)
	}
	if m2.Session().Statistics.TotalAssignedJobs != 2 {
		t.Errorf("the new session's statistics are %+v", m2.Session().Statistics)
	}
	if again := message(t, m2, 2); again == nil || again.MessageID != first.MessageID {
		t.Fatalf("the message was not replayed: %+v", again)
	}
	if err := m2.DeleteMessage(t.Context(), first.MessageID); err != nil {
		t.Fatal(err)
	}
	if msg := message(t, m2, 2); msg != nil {
		t.Fatalf("after the acknowledgement: %+v", msg)
	}
	if msg := message(t, m2, 3); msg == nil || len(msg.JobAssignedMessages) != 1 {
		t.Fatalf("with capacity for the third: %+v", msg)
	}
}

func TestBatchesHoldFiftyMessages(t *testing.T) {
	r := newRig(t, Config{Poll: 50 * time.Millisecond})
	_, _, m := r.session("flint")
	for range 60 {
		submit(t, r, oneJob)
	}
	var sizes []int
	for msg := message(t, m, 100); msg != nil; msg = message(t, m, 100) {
		sizes = append(sizes, len(msg.JobAssignedMessages))
		if err := m.DeleteMessage(t.Context(), msg.MessageID); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff([]int{50, 10}, sizes); d != "" {
		t.Errorf("sizes (-want +got):\n%s", d)
	}
}

func TestSecondSessionConflictsUntilTheFirstIsIdle(t *testing.T) {
	r := newRig(t, Config{Poll: time.Millisecond})
	c, set, _ := r.session("flint")
	_, err := c.MessageSessionClient(t.Context(), set.ID, "other")
	if err == nil || !strings.Contains(err.Error(), "409") || !strings.Contains(err.Error(), "owned by test") {
		t.Fatalf("got %v, want a conflict", err)
	}
	r.hub.read(func() { r.hub.sets[0].lastPoll = time.Now().Add(-time.Hour) })
	if _, err := c.MessageSessionClient(t.Context(), set.ID, "other"); err != nil {
		t.Fatalf("an idle session did not give way: %v", err)
	}
}

func TestExpiredQueueTokenIsRefreshed(t *testing.T) {
	r := newRig(t, Config{Poll: time.Millisecond})
	_, _, m := r.session("flint")
	before := m.Session().MessageQueueAccessToken
	r.creds.mu.Lock()
	for k, v := range r.creds.known {
		if v.kind == credQueue {
			v.expires = time.Now().Add(-time.Second)
			r.creds.known[k] = v
		}
	}
	r.creds.mu.Unlock()
	if msg := message(t, m, 1); msg != nil {
		t.Fatalf("got %+v", msg)
	}
	if m.Session().MessageQueueAccessToken == before {
		t.Error("the client kept its expired token")
	}
}

func TestRegistrations(t *testing.T) {
	r := newRig(t, Config{Poll: 10 * time.Second})
	c, set, m := r.session("flint")
	ctx := t.Context()
	x, id := r.jit(c, set.ID, "one")
	_, err := c.GenerateJitRunnerConfig(ctx, &scaleset.RunnerScaleSetJitRunnerSetting{Name: "One"}, set.ID)
	if !errors.Is(err, scaleset.RunnerExistsError) {
		t.Errorf("a second registration of the name: %v", err)
	}
	if _, err := c.GenerateJitRunnerConfig(ctx, &scaleset.RunnerScaleSetJitRunnerSetting{Name: "two"}, 999); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("a registration for no scale set: %v", err)
	}
	if got, err := c.GetRunnerByName(ctx, "one"); err != nil || got == nil || got.ID != id || got.RunnerScaleSetID != set.ID {
		t.Errorf("GetRunnerByName: %+v, %v", got, err)
	}
	if got, err := c.GetRunner(ctx, id); err != nil || got.Name != "one" {
		t.Errorf("GetRunner: %+v, %v", got, err)
	}
	submit(t, r, oneJob)
	message(t, m, 1)
	x.online()
	x.acquire()
	if err := c.RemoveRunner(ctx, int64(id)); !errors.Is(err, scaleset.JobStillRunningError) {
		t.Errorf("removing a busy runner: %v", err)
	}
	x.want(200, x.complete("succeeded"), "complete")
	if err := c.RemoveRunner(ctx, int64(id)); !errors.Is(err, scaleset.RunnerNotFoundError) {
		t.Errorf("removing a runner that is gone: %v", err)
	}
	if status := x.login(x.assertion(x.key, time.Now().Add(time.Minute))); status != 400 {
		t.Errorf("a runner that is gone logs in: %d", status)
	}
}

// A runner that goes before it begins its job leaves it to the next.
func TestJobOfARunnerThatWentGoesToAnother(t *testing.T) {
	r := newRig(t, Config{Poll: 10 * time.Second})
	c, set, m := r.session("flint")
	run := submit(t, r, oneJob)
	message(t, m, 1)
	x, id := r.jit(c, set.ID, "one")
	x.online()
	_, body := x.poll()
	if err := c.RemoveRunner(t.Context(), int64(id)); err != nil {
		t.Fatal(err)
	}
	if status := x.call("POST", r.cfg.URL+"/run/acquirejob", x.token, map[string]any{"jobMessageId": body["runner_request_id"]}, nil); status != 401 {
		t.Errorf("a removed runner acquires: %d", status)
	}
	y, _ := r.jit(c, set.ID, "two")
	y.online()
	y.acquire()
	y.want(200, y.complete("succeeded"), "complete")
	r.waitRun(run, Success)
}

func TestLostRunnerFailsItsJob(t *testing.T) {
	r := newRig(t, Config{Poll: 10 * time.Second, Lease: 300 * time.Millisecond})
	c, set, m := r.session("flint")
	run := submit(t, r, oneJob)
	message(t, m, 1)
	x, id := r.jit(c, set.ID, "one")
	x.online()
	x.acquire()
	r.waitRun(run, Failure)
	if status := x.renew(); status != 404 {
		t.Errorf("renewing a job that is over: %d", status)
	}
	if got := r.Runners(); len(got) != 1 || got[0].Busy || got[0].Online {
		t.Errorf("registrations: %+v, want one that is offline", got)
	}
	if err := c.RemoveRunner(t.Context(), int64(id)); err != nil {
		t.Error(err)
	}
}

func TestScaleSetsLive(t *testing.T) {
	r := newRig(t, Config{Poll: time.Millisecond})
	c := r.client()
	ctx := t.Context()
	g, err := c.GetRunnerGroupByName(ctx, "default")
	if err != nil || g.ID != 1 || !g.IsDefault {
		t.Fatalf("default group: %+v, %v", g, err)
	}
	if got, err := c.GetRunnerScaleSet(ctx, 1, "flint"); err != nil || got != nil {
		t.Fatalf("before it exists: %+v, %v", got, err)
	}
	set := r.scaleSet(c, "flint")
	if _, err := c.CreateRunnerScaleSet(ctx, &scaleset.RunnerScaleSet{Name: "flint"}); err == nil || !strings.Contains(err.Error(), "409") {
		t.Errorf("a second one of the name: %v", err)
	}
	got, err := c.GetRunnerScaleSet(ctx, 1, "flint")
	if err != nil || got.ID != set.ID || len(got.Labels) != 1 || got.Labels[0].Name != "flint" {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, err = c.UpdateRunnerScaleSet(ctx, set.ID, &scaleset.RunnerScaleSet{Name: "steel", RunnerSetting: scaleset.RunnerSetting{DisableUpdate: true}}); err != nil || got.Name != "steel" || !got.RunnerSetting.DisableUpdate {
		t.Errorf("updated: %+v, %v", got, err)
	}
	if err := c.DeleteRunnerScaleSet(ctx, set.ID); err != nil {
		t.Error(err)
	}
	if _, err := c.GetRunnerScaleSetByID(ctx, set.ID); err == nil {
		t.Error("it is still there")
	}
}

func TestRESTRunners(t *testing.T) {
	r := newRig(t, Config{})
	c, set, _ := r.session("flint")
	for i := range 3 {
		r.jit(c, set.ID, fmt.Sprintf("r%d", i))
	}
	token := r.creds.issue(credInstallation, "", time.Minute)
	x := &fakeRunner{t: t}
	var list struct {
		Total   int `json:"total_count"`
		Runners []struct {
			ID     int64
			Name   string
			Status string
		}
	}
	x.want(200, x.call("GET", r.cfg.URL+"/api/v3/repos/acme/widget/actions/runners", token, nil, &list), "list of the repository's")
	if list.Total != 0 {
		t.Errorf("the repository has the organisation's runners: %+v", list)
	}
	x.want(200, x.call("GET", r.cfg.URL+"/api/v3/orgs/acme/actions/runners?per_page=2&page=2", token, nil, &list), "list")
	if list.Total != 3 || len(list.Runners) != 1 || list.Runners[0].Name != "r2" || list.Runners[0].Status != "offline" {
		t.Errorf("%+v", list)
	}
	x.want(404, x.call("GET", r.cfg.URL+"/api/v3/orgs/other/actions/runners", token, nil, nil), "list of another")
	x.want(204, x.call("DELETE", fmt.Sprintf("%s/api/v3/orgs/acme/actions/runners/%d", r.cfg.URL, list.Runners[0].ID), token, nil, nil), "delete")
	x.want(http.StatusNotFound, x.call("DELETE", fmt.Sprintf("%s/api/v3/orgs/acme/actions/runners/%d", r.cfg.URL, list.Runners[0].ID), token, nil, nil), "delete again")
}

func TestForceCancelWaitsForNobody(t *testing.T) {
	r := newRig(t, Config{Poll: 10 * time.Second})
	c, set, m := r.session("flint")
	run := submit(t, r, "on: push\njobs:\n  a:\n    runs-on: flint\n    steps:\n      - run: sleep 1000\n"+
		"  b:\n    needs: a\n    if: always()\n    runs-on: flint\n    steps:\n      - run: 'true'\n")
	message(t, m, 1)
	x, id := r.jit(c, set.ID, "one")
	x.online()
	x.acquire()
	run.ForceCancel()
	r.waitRun(run, Cancelled)
	if left := r.Inventory(); left.OpenJobs != 0 || len(left.Runners) != 0 {
		t.Errorf("left: %+v", left)
	}
	if err := c.RemoveRunner(t.Context(), int64(id)); !errors.Is(err, scaleset.RunnerNotFoundError) {
		t.Errorf("its runner is kept: %v", err)
	}
	if status := x.complete("succeeded"); status < 400 {
		t.Errorf("a job that is over is completed: %d", status)
	}
}
