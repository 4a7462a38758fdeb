package github

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/actions/scaleset"
	"github.com/google/uuid"
	"github.com/hashicorp/go-retryablehttp"

	"flint"
)

// defaultGroup is the id of the runner group every organisation and repository has.
const defaultGroup = 1

// service is one client of the scale set library, and all that is known of the library's types.
type service struct {
	scope *scope
	c     *scaleset.Client
	wire  *recorder
	// gate is held during a call. The library has a mutex of its own around each call, which nobody can stop waiting for.
	gate chan struct{}
}

// newService makes a client that does not retry by itself: retries are ours, so that they can be seen and are bounded once.
func newService(s *scope, cred *credential) (*service, error) {
	wire := cred.recorder()
	options := []scaleset.HTTPOption{
		scaleset.WithRetryableHTTPClint(libraryClient(wire)),
		scaleset.WithLogger(slog.New(slog.DiscardHandler)), // it logs URLs; what matters comes back as errors
	}
	info := scaleset.SystemInfo{System: "flint", Subsystem: "coordinator"}
	var c *scaleset.Client
	var err error
	if s.account.Token != "" {
		c, err = scaleset.NewClientWithPersonalAccessToken(scaleset.NewClientWithPersonalAccessTokenConfig{
			GitHubConfigURL: s.url, PersonalAccessToken: string(s.account.Token), SystemInfo: info,
		}, options...)
	} else {
		c, err = scaleset.NewClientWithGitHubApp(scaleset.ClientWithGitHubAppConfig{
			GitHubConfigURL: s.url, SystemInfo: info,
			GitHubAppAuth: scaleset.GitHubAppAuth{
				ClientID: s.account.AppID, InstallationID: cred.installation, PrivateKey: string(s.account.PrivateKey),
			},
		}, options...)
	}
	if err != nil {
		return nil, fmt.Errorf("make scale set client: %w", err)
	}
	return &service{scope: s, c: c, wire: wire, gate: make(chan struct{}, 1)}, nil
}

// libraryClient wraps our transport in what the library insists on: a retrying client whose transport is an *http.Transport.
// That one only hands every request on to ours. The library changes fields of this client, so each service needs its own.
func libraryClient(rt http.RoundTripper) *retryablehttp.Client {
	outer := &http.Transport{TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}}
	for _, scheme := range []string{"http", "https"} {
		outer.RegisterProtocol(scheme, rt)
	}
	c := retryablehttp.NewClient()
	// Each call has its own deadline. The library puts in one where there is none; it would also keep a goroutine for its whole
	// length after every answer that breaks off.
	c.HTTPClient = &http.Client{Transport: outer, Timeout: -1}
	c.RetryMax = 0
	return c
}

// call runs one call of the library; see observe for its errors.
func (s *service) call(ctx context.Context, verb string, timeout time.Duration, f func(context.Context) error) error {
	select {
	case s.gate <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", verb, ctx.Err())
	}
	defer func() { <-s.gate }()
	err := observe(ctx, s.scope, verb, timeout, f)
	var e *callError
	if errors.As(err, &e) && e.signedOut() {
		s.scope.forget(s) // its tokens are not taken any more; the next one signs in anew
	}
	return err
}

// setName is the name of a pool's scale set, which is also its label.
func setName(pool flint.Pool) string {
	if len(pool.Labels) == 0 {
		return pool.Name
	}
	return pool.Labels[0]
}

// scaleSet finds or creates the pool's scale set and returns its id.
func (s *service) scaleSet(ctx context.Context, pool flint.Pool) (int, error) {
	name := setName(pool)
	group, err := s.group(ctx, pool.Group)
	if err != nil {
		return 0, err
	}
	var set *scaleset.RunnerScaleSet
	err = s.call(ctx, "find scale set "+name, callTimeout, func(ctx context.Context) (err error) {
		set, err = s.c.GetRunnerScaleSet(ctx, group, url.QueryEscape(name))
		return err
	})
	if err == nil && set == nil {
		err = s.call(ctx, "create scale set "+name, callTimeout, func(ctx context.Context) (err error) {
			set, err = s.c.CreateRunnerScaleSet(ctx, &scaleset.RunnerScaleSet{
				Name: name, RunnerGroupID: group,
				Labels: []scaleset.Label{{Name: name, Type: "System"}},
				// A runner that lives for one job has nothing to gain from updating itself first.
				RunnerSetting: scaleset.RunnerSetting{DisableUpdate: true},
			})
			return err
		})
		if st := refused(err); st == http.StatusBadRequest || st == http.StatusUnprocessableEntity {
			err = &flint.Fault{
				Code: "github.pool", What: fmt.Sprintf("make scale set %s of pool %s in %s", name, pool.Name, s.scope.name),
				Kind: flint.ErrConfig, Err: err, Fix: "give the pool another name, or its first label another: GitHub refuses this one",
			}
		}
	}
	if err != nil {
		return 0, err
	}
	if set.ID <= 0 {
		return 0, fmt.Errorf("find scale set %s: GitHub gave it the id %d", name, set.ID)
	}
	return set.ID, nil
}

// group returns the id of a runner group.
func (s *service) group(ctx context.Context, name string) (int, error) {
	if name == "" || strings.EqualFold(name, scaleset.DefaultRunnerGroup) {
		return defaultGroup, nil
	}
	var group *scaleset.RunnerGroup
	err := s.call(ctx, "find runner group "+name, callTimeout, func(ctx context.Context) (err error) {
		group, err = s.c.GetRunnerGroupByName(ctx, url.QueryEscape(name))
		return err
	})
	var e *callError
	if errors.As(err, &e) && e.status == http.StatusOK {
		return 0, s.scope.groupFault(name, e.err)
	}
	if err != nil {
		return 0, err
	}
	return group.ID, nil
}

// jit registers a runner. The JIT configuration is bounded and not empty.
func (s *service) jit(ctx context.Context, set int, name string) (reg flint.Registration, err error) {
	err = s.call(ctx, "register runner "+name, callTimeout, func(ctx context.Context) error {
		conf, err := s.c.GenerateJitRunnerConfig(ctx, &scaleset.RunnerScaleSetJitRunnerSetting{Name: name, WorkFolder: "_work"}, set)
		if err != nil {
			return err
		}
		if conf == nil || conf.Runner == nil {
			return errors.New("the answer names no runner")
		}
		reg, err = registered(name, int64(conf.Runner.ID), conf.EncodedJITConfig)
		return err
	})
	return reg, err
}

// find looks a runner up by its name. It returns 0 when there is none, and the id of the scale set it belongs to.
func (s *service) find(ctx context.Context, name string) (id int64, set int, err error) {
	var ref *scaleset.RunnerReference
	err = s.call(ctx, "look up runner "+name, callTimeout, func(ctx context.Context) (err error) {
		ref, err = s.c.GetRunnerByName(ctx, url.QueryEscape(name))
		return err
	})
	if err != nil || ref == nil {
		return 0, 0, err
	}
	return int64(ref.ID), ref.RunnerScaleSetID, nil
}

// remove deletes a registration.
func (s *service) remove(ctx context.Context, name string, id int64) error {
	return s.call(ctx, "remove runner "+name, callTimeout, func(ctx context.Context) error { return s.c.RemoveRunner(ctx, id) })
}

// session is an open message session. It is for one goroutine.
type session struct {
	svc *service
	c   *scaleset.MessageSessionClient
}

// open begins a message session and returns it with the statistics it began with, which may be nil.
func (s *service) open(ctx context.Context, set int, owner string) (*session, *statistics, error) {
	var c *scaleset.MessageSessionClient
	err := s.call(ctx, "open message session", callTimeout, func(ctx context.Context) (err error) {
		c, err = s.c.MessageSessionClient(ctx, set, owner)
		if err == nil && !(&session{svc: s, c: c}).usable() {
			err = errors.New("the answer has no id, queue or token")
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return &session{svc: s, c: c}, convertStatistics(c.Session().Statistics), nil
}

// usable reports whether the session has what a poll needs. A refresh replaces all of it by what GitHub answers. The queue's
// token must not travel in the clear where the scope's did not.
func (s *session) usable() bool {
	have := s.c.Session()
	queue, err := url.Parse(have.MessageQueueURL)
	return err == nil && queue.Host != "" && have.SessionID != uuid.Nil && have.MessageQueueAccessToken != "" &&
		(queue.Scheme == "https" || queue.Scheme == "http" && strings.HasPrefix(s.svc.scope.api, "http:"))
}

func (s *session) id() string { return s.c.Session().SessionID.String() }

// next polls for the message after last. It returns nil when there is none.
func (s *session) next(ctx context.Context, last, capacity int) (*message, error) {
	var m *scaleset.RunnerScaleSetMessage
	err := s.svc.call(ctx, "poll for messages", pollTimeout, func(ctx context.Context) (err error) {
		m, err = s.c.GetMessage(ctx, last, capacity)
		return err
	})
	if err != nil || m == nil {
		return nil, err
	}
	return convertMessage(m), nil
}

// acknowledge deletes a message. One that is gone already is as good.
func (s *session) acknowledge(ctx context.Context, id int) error {
	err := s.svc.call(ctx, fmt.Sprintf("acknowledge message %d", id), callTimeout, func(ctx context.Context) error {
		return s.c.DeleteMessage(ctx, id)
	})
	if refused(err) == http.StatusNotFound {
		return nil
	}
	return err
}

// acquire asks for jobs and returns how many we got.
func (s *session) acquire(ctx context.Context, requests []int64) (int, error) {
	var got []int64
	err := s.svc.call(ctx, "acquire jobs", callTimeout, func(ctx context.Context) (err error) {
		got, err = s.c.AcquireJobs(ctx, requests)
		return err
	})
	return len(got), err
}

// close deletes the session; until then GitHub refuses another one. One that is gone already is as good.
func (s *session) close(ctx context.Context) error {
	err := s.svc.call(ctx, "close message session", callTimeout, s.c.Close)
	if refused(err) == http.StatusNotFound {
		return nil
	}
	return err
}

// refused returns the HTTP status of a refusal that means what it says of the thing asked for; 0 for anything else, and where
// it amounts to a fault: that the installation is not found says nothing of a runner.
func refused(err error) int {
	var f *flint.Fault
	if errors.As(err, &f) {
		return 0
	}
	return status(err)
}

// discard deletes a session that was opened with a service whose tokens are not taken any more. Until then GitHub refuses
// another one.
func (s *service) discard(ctx context.Context, set int, id string) error {
	return s.call(ctx, "close the message session of before", closeTimeout, func(ctx context.Context) error {
		req := s.wire.session(ctx, set, id)
		if req == nil {
			return errors.New("the service is not known yet")
		}
		resp, err := s.wire.RoundTrip(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode >= 300 {
			return errors.New(resp.Status)
		}
		return nil
	})
}

// status returns the HTTP status of a refusal; 0 for anything else.
func status(err error) int {
	var e *callError
	if errors.As(err, &e) {
		return e.status
	}
	return 0
}
