package kernel

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// ubuntu is a release of Ubuntu's kernel, made up as its packages are laid out.
type ubuntu struct {
	release string            // uname -r
	image   string            // the package with the kernel
	payload string            // how the kernel is packed
	suffix  string            // of modules
	prefix  string            // of the module tree
	builtin string            // modules.builtin
	modules []string          // paths of those in linux-modules
	extra   []string          // in linux-modules-extra; nil: there is no such package
	metas   map[string]string // what other packages depend on, by name
	depends string            // what the extra modules depend on
}

// offer puts the packages into the archive.
func (u ubuntu) offer(t *testing.T, w *world) {
	t.Helper()
	const version = "1.2-3.4"
	plain := makeKernel(u.release)
	payload := packers()[u.payload](t, plain)
	if u.payload != "gzip" {
		payload = withSize(payload, plain)
	}
	tree := func(modules []string, more ...debFile) []byte {
		for _, m := range modules {
			data := []byte("\x7fELF module " + m)
			if u.suffix == ".ko.zst" {
				data = packers()["zstd"](t, data)
			}
			more = append(more, debFile{name: u.prefix + u.release + "/kernel/" + m + u.suffix, data: data})
		}
		return makeDeb(t, "zstd", more)
	}
	w.offer(u.image, version, "kmod, linux-base (>= 4.5ubuntu1~16.04.1), linux-modules-"+u.release,
		makeDeb(t, "zstd", []debFile{{name: "./boot/vmlinuz-" + u.release, data: makeBzImage(payload)}}))
	w.offer("linux-modules-"+u.release, version, "", tree(u.modules,
		debFile{name: "./boot/config-" + u.release, data: []byte("CONFIG_VETH=m\nCONFIG_WIREGUARD=m\nCONFIG_IP_MULTIPLE_TABLES=y\nCONFIG_IPV6_MULTIPLE_TABLES=y\n")},
		debFile{name: "./boot/System.map-" + u.release, data: []byte("ignored")},
		debFile{name: u.prefix + u.release + "/modules.builtin", data: []byte(u.builtin)},
		debFile{name: u.prefix + u.release + "/modules.order", data: []byte("\n")},
		debFile{name: u.prefix + u.release + "/initrd/vga16fb" + u.suffix, data: packers()["zstd"](t, []byte("x"))}))
	if u.extra != nil {
		w.offer("linux-modules-extra-"+u.release, version, u.depends, tree(u.extra))
	}
	for name, depends := range u.metas {
		w.offer(name, version, depends, []byte("nothing in it"))
	}
	w.modules = map[string][]string{"kernel/veth.ko": nil, "kernel/wireguard.ko": nil}
	maps.Copy(w.modules, testModules())
}

func TestPrepareFromUbuntu(t *testing.T) {
	var all []string
	for m := range testModules() {
		all = append(all, strings.TrimSuffix(strings.TrimPrefix(m, "kernel/"), ".ko"))
	}
	slices.Sort(all)
	const ext4 = "kernel/fs/ext4/ext4.ko\n"
	for name, tt := range map[string]struct {
		ubuntu
		source    Source
		wireguard string // verdict: its module is in the extra package
	}{
		"virtual, the default": {
			ubuntu: ubuntu{
				release: "6.8.0-31-generic", image: "linux-image-6.8.0-31-generic", payload: "zstd", suffix: ".ko.zst", prefix: "./lib/modules/",
				builtin: ext4, modules: all, extra: []string{"wireguard"}, depends: "linux-image-6.8.0-31-generic | linux-image-unsigned-6.8.0-31-generic",
				metas: map[string]string{"linux-image-virtual": "linux-image-6.8.0-31-generic (= 6.8.0-31.31)"},
			},
			wireguard: Fails,
		},
		"generic, with extra modules that would have an unsigned kernel": {
			ubuntu: ubuntu{
				release: "6.8.0-31-generic", image: "linux-image-6.8.0-31-generic", payload: "zstd", suffix: ".ko.zst", prefix: "./lib/modules/",
				builtin: ext4, modules: all, extra: []string{"wireguard"}, depends: "linux-image-unsigned-6.8.0-31-generic | linux-image-6.8.0-31-generic",
				metas: map[string]string{"linux-image-generic": "linux-image-6.8.0-31-generic (= 6.8.0-31.31), linux-modules-extra-6.8.0-31-generic (= 6.8.0-31.31), linux-firmware, intel-microcode"},
			},
			source: Source{Package: "linux-image-generic"}, wireguard: Partly,
		},
		"unsigned, by its own name": {
			ubuntu: ubuntu{
				release: "6.14.0-15-generic", image: "linux-image-unsigned-6.14.0-15-generic", payload: "zstd", suffix: ".ko.zst", prefix: "./usr/lib/modules/",
				builtin: ext4, modules: all,
			},
			source: Source{Package: "linux-image-unsigned-6.14.0-15-generic"}, wireguard: Fails,
		},
		"kvm, with its drivers built in": {
			ubuntu: ubuntu{
				release: "5.15.0-1058-kvm", image: "linux-image-5.15.0-1058-kvm", payload: "lz4", suffix: ".ko", prefix: "./lib/modules/",
				builtin: ext4 + "kernel/drivers/virtio/virtio.ko\nkernel/drivers/virtio/virtio_ring.ko\nkernel/drivers/virtio/virtio_mmio.ko\n" +
					"kernel/drivers/block/virtio_blk.ko\nkernel/drivers/net/virtio_net.ko\nkernel/drivers/char/virtio_console.ko\n" +
					"kernel/fs/overlayfs/overlay.ko\nkernel/net/vmw_vsock/vmw_vsock_virtio_transport.ko\n",
				modules: []string{"drivers/net/veth", "wireguard"},
				metas:   map[string]string{"linux-image-kvm": "linux-image-5.15.0-1058-kvm"},
			},
			source: Source{Package: "linux-image-kvm"}, wireguard: Partly,
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.write(t, filepath.Join(w.dir, "os-release"), "ID=ubuntu\nID_LIKE=debian\n")
			tt.offer(t, w)
			pack := w.prepare(t, tt.source)
			if pack.Version != tt.release || pack.Modules == "" {
				t.Errorf("got %+v", pack)
			}
			initrd, err := os.ReadFile(pack.Initrd)
			boots := strings.Contains(tt.builtin, "virtio_blk") || bytes.Contains(initrd, []byte("modules/virtio_blk.ko\x00"))
			if err != nil || !boots || bytes.Contains(initrd, []byte(".zst")) {
				t.Errorf("the initramfs lacks a plain virtio_blk.ko (%v)", err)
			}
			kept, err := Find(filepath.Join(w.dir, "cache"), tt.release)
			if err != nil {
				t.Fatal(err)
			}
			if got := find(t, kept.Workloads, "wireguard"); got.Verdict != tt.wireguard {
				t.Errorf("got %+v, want %s", got, tt.wireguard)
			}
		})
	}
}
