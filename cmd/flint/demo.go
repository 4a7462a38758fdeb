package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
	"flint/internal/githubsim"
	"flint/internal/regular"
)

// The demo has a network of its own, so that it can run beside `flint serve`.
const (
	demoBridge = "flintdemo"
	demoIPv4   = "10.213.16.0/24"
	demoIPv6   = "fd4f:6c69:6e74:16::/64"
)

// demoImage is the image where no other is named: in a checkout a directory.
const demoImage = "images/demo"

// inCheckout refuses to go on with the default image where it is not. It is also a good name of an image in a registry, which
// somebody else may have made.
func inCheckout(c *cobra.Command) error {
	if c.Flags().Changed("image") {
		return nil
	}
	_, err := os.Stat(demoImage)
	if err == nil {
		return nil
	}
	return &flint.Fault{
		Code: "image.missing", What: "find the demo's image", Kind: flint.ErrNotFound, Err: err,
		Fix: "run flint in its checkout, or name an image with --image",
	}
}

type demoFlags struct {
	workflow, image, runner, stateDir, accel string
	ipv4                                     netip.Prefix
	fail, verbose                            bool
}

func newDemo() *cobra.Command {
	var f demoFlags
	c := &cobra.Command{
		Use: "demo", Short: "Run a real workflow in real microVMs against a simulated GitHub, and show what happened", Args: noArgs,
		Long: "Demo needs neither a GitHub account nor KVM. It prepares what is missing, starts a simulated GitHub and the\n" +
			"coordinator, queues the workflow, streams its log, and shows the timeline, the memory the VMs used, and the proof\n" +
			"that nothing is left. Its exit code is 0 if the workflow succeeded and 1 if it failed.",
	}
	fl := c.Flags()
	fl.StringVar(&f.workflow, "workflow", "examples/hello/.github/workflows/ci.yml", "workflow file")
	fl.StringVar(&f.image, "image", demoImage, "the VMs' image")
	fl.StringVar(&f.runner, "runner", "images/demo-runner", "Go module of the demo's runner software, or a directory as runner.dir takes it")
	fl.StringVar(&f.stateDir, "state-dir", "", "where images, kernels and records are kept (overrides FLINT_STATE_DIR)")
	fl.TextVar(&f.ipv4, "ipv4", netip.MustParsePrefix(demoIPv4), "`subnet` of the VMs' network")
	fl.StringVar(&f.accel, "accel", "", "auto, kvm or tcg (overrides FLINT_VM_ACCEL)")
	fl.BoolVar(&f.fail, "fail", false, "make one of the jobs fail")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "show what the runner says of itself, too")
	c.RunE = func(c *cobra.Command, _ []string) error {
		ok, err := f.run(c)
		if c.Context().Err() != nil && stopped(c.Context(), err) == nil {
			return exitError(exitInterrupted)
		}
		if err == nil && !ok {
			return exitError(exitFailed)
		}
		return err
	}
	return c
}

func (f *demoFlags) config(c *cobra.Command) (config.Config, error) {
	cfg, err := config.FromEnvironment(os.Environ())
	if err != nil {
		return cfg, err
	}
	if f.stateDir != "" {
		cfg.StateDir = f.stateDir
	}
	if f.accel != "" {
		cfg.VM.Accel = f.accel
	}
	ref, err := fromAnywhere(f.image)
	if err != nil {
		return cfg, err
	}
	cfg.Network = config.Network{Bridge: demoBridge, IPv4: f.ipv4, IPv6: netip.MustParsePrefix(demoIPv6)}
	cfg.Pools = []config.Pool{{
		Name: "flint", Image: ref, Max: 2,
		VM: config.Shape{CPUs: 1, Memory: 512 * flint.MiB, Disk: 4 * flint.GiB},
	}}
	return cfg, flagged(c, cfg.Complete(), map[string]string{"pools[0].image": "image", "network.ipv4": "ipv4", "vm.accel": "accel"})
}

// demo is what one demonstration holds.
type demo struct {
	out    io.Writer
	style  style
	sim    *githubsim.Server
	app    *app.App
	show   *transcript
	server *http.Server
	listen net.Listener
}

// run shows everything there is to show and reports whether the workflow succeeded.
func (f *demoFlags) run(c *cobra.Command) (ok bool, err error) {
	ctx := c.Context()
	cfg, err := f.config(c)
	if err != nil {
		return false, err
	}
	log, err := logger(c, c.ErrOrStderr(), "warn", true)
	if err != nil {
		return false, err
	}
	workflow, err := readWorkflow(f.workflow)
	if err != nil {
		return false, err
	}
	if err := inCheckout(c); err != nil {
		return false, err
	}
	out := c.OutOrStdout()
	d := &demo{out: out, style: styleOf(out)}
	d.show = newTranscript(out, d.style)
	d.show.verbose = f.verbose
	fmt.Fprintf(out, "\n%s  a real workflow job in a real, throw-away microVM on this machine\n\n", d.style.paint(bold, "flint demo"))

	gateway := cfg.Network.IPv4.Masked().Addr().Next()
	service, err := d.serveGitHub(ctx, gateway)
	if err != nil {
		return false, err
	}
	defer d.stopGitHub()
	cfg.GitHub.URL, cfg.GitHub.Repository = "http://"+service.String(), demoOwner+"/"+demoRepo
	cfg.GitHub.AppID, cfg.GitHub.InstallationID = d.sim.App().ID, d.sim.App().InstallationID
	cfg.GitHub.PrivateKey = d.sim.App().PrivateKeyPEM

	opt := app.Options{
		Log: log, Progress: newSteps(out).report, Instance: "demo", LocalBase: true,
		Services: []netip.AddrPort{service}, Result: d.show.result,
	}
	if d.app, err = f.prepare(ctx, cfg, opt); err != nil {
		return false, err
	}
	conclusion, err := d.work(ctx, workflow, f.fail)
	err = errors.Join(err, d.app.Close(ctx))
	left, lerr := d.leftovers()
	d.show.end(conclusion, left)
	return err == nil && conclusion == githubsim.Success && len(left) == 0, errors.Join(stopped(ctx, err), lerr)
}

func readWorkflow(path string) (*githubsim.Workflow, error) {
	src, err := regular.Read(path, maxGiven)
	if err != nil {
		return nil, &flint.Fault{
			Code: "workflow.missing", What: "read the workflow " + path, Kind: flint.ErrNotFound, Err: err,
			Fix: "run the demo in a checkout of flint, or name a file with --workflow",
		}
	}
	return githubsim.ParseWorkflow(path, src)
}

const demoOwner, demoRepo = "acme", "hello"

// serveGitHub starts the simulated GitHub on the address the bridge is going to have.
func (d *demo) serveGitHub(ctx context.Context, gateway netip.Addr) (netip.AddrPort, error) {
	l, err := app.ListenAhead(ctx, netip.AddrPortFrom(gateway, 0))
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("listen for the simulated GitHub: %w", err)
	}
	service := l.Addr().(*net.TCPAddr).AddrPort()
	d.sim, err = githubsim.New(githubsim.Config{
		URL: "http://" + service.String(), Owner: demoOwner, Repo: demoRepo, Observe: d.show.event,
	})
	if err != nil {
		return netip.AddrPort{}, errors.Join(err, l.Close())
	}
	d.listen = l
	d.server = &http.Server{Handler: d.sim.Handler(), ReadHeaderTimeout: 10 * time.Second}
	return service, nil
}

func (d *demo) stopGitHub() {
	d.sim.Close()
	_ = d.server.Close()
	_ = d.listen.Close()
}

// prepare makes what the VMs boot. The runner's software must be built, where it is not, before the configuration can
// name it.
func (f *demoFlags) prepare(ctx context.Context, cfg config.Config, opt app.Options) (*app.App, error) {
	cfg.Runner.Dir = f.runner
	if _, err := os.Stat(filepath.Join(f.runner, "go.mod")); err == nil {
		if cfg.Runner.Dir, err = app.DemoRunner(ctx, cfg.StateDir, f.runner, opt.Progress); err != nil {
			return nil, err
		}
	}
	a, err := app.New(ctx, cfg, opt)
	if err != nil {
		return nil, err
	}
	err = a.Connect(ctx)
	if err == nil {
		err = a.Prepare(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, a.Close(ctx))
	}
	return a, nil
}

// work runs the coordinator until the workflow is over.
func (d *demo) work(ctx context.Context, w *githubsim.Workflow, fail bool) (githubsim.Conclusion, error) {
	fmt.Fprintln(d.out)
	trigger := githubsim.Trigger{}
	if fail {
		trigger.Inputs = map[string]string{"fail": "true"}
	}
	run, err := d.sim.Submit(w, trigger)
	if err != nil {
		return "", err
	}
	d.show.mu.Lock()
	d.show.giveUp = run.ForceCancel
	d.show.mu.Unlock()
	// Whatever the runners do when they are stopped, GitHub must not think that they still have a job.
	defer context.AfterFunc(ctx, run.ForceCancel)()
	var conclusion githubsim.Conclusion
	serve, stopServing := context.WithCancel(ctx)
	defer stopServing()
	tasks, tctx := errgroup.WithContext(serve)
	tasks.Go(func() error { return ignoreClosed(d.server.Serve(d.listen)) })
	tasks.Go(func() error {
		defer func() { _ = d.server.Close() }()
		return d.app.Serve(serve)
	})
	tasks.Go(func() error {
		defer stopServing()
		var err error
		conclusion, err = run.Wait(tctx)
		if err == nil {
			d.awaitRunners(tctx)
		}
		return err
	})
	err = tasks.Wait()
	return conclusion, err
}

func ignoreClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// awaitRunners gives the VMs whose jobs are done the moment they need to end by themselves.
func (d *demo) awaitRunners(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	d.show.awaitResults(ctx)
}

func (d *demo) leftovers() ([]string, error) {
	left, err := d.app.Leftovers()
	for _, r := range d.sim.Runners() {
		left = append(left, "registration "+r.Name)
	}
	return left, err
}
