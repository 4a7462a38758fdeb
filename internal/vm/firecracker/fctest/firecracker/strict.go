package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// config is what the requests have said so far.
type config struct {
	machine machineConfig
	boot    bootConfig
	vsock   vsockConfig
}

type (
	machineConfig struct {
		CPUs      int   `json:"vcpu_count"`
		MemoryMiB int64 `json:"mem_size_mib"`
	}
	bootConfig struct {
		Kernel string `json:"kernel_image_path"`
		Initrd string `json:"initrd_path"`
		Args   string `json:"boot_args"`
	}
	vsockConfig struct {
		CID  uint32 `json:"guest_cid"`
		Path string `json:"uds_path"`
	}
)

// field is what the real one's structures say of a field.
type field struct {
	required bool
	since    int   // minor release; 0: always
	inner    shape // of an object
}

// shape is one structure: its fields by name. All refuse others.
type shape map[string]field

var (
	bucketShape  = shape{"size": {required: true}, "one_time_burst": {}, "refill_time": {required: true}}
	limiterShape = shape{"bandwidth": {inner: bucketShape}, "ops": {inner: bucketShape}}
	loggerShape  = shape{"log_path": {}, "level": {}, "show_level": {}, "show_log_origin": {}, "module": {}}
	metricsShape = shape{"metrics_path": {required: true}}
	machineShape = shape{"vcpu_count": {required: true}, "mem_size_mib": {required: true}, "smt": {}, "cpu_template": {}, "track_dirty_pages": {}, "huge_pages": {}}
	bootShape    = shape{"kernel_image_path": {required: true}, "initrd_path": {}, "boot_args": {}}
	driveShape   = shape{
		"drive_id": {required: true}, "partuuid": {}, "is_root_device": {required: true}, "cache_type": {}, "is_read_only": {},
		"path_on_host": {}, "rate_limiter": {inner: limiterShape}, "io_engine": {}, "socket": {},
	}
	nicShape = shape{
		"iface_id": {required: true}, "host_dev_name": {required: true}, "guest_mac": {}, "mtu": {since: 16},
		"rx_rate_limiter": {inner: limiterShape}, "tx_rate_limiter": {inner: limiterShape},
	}
	vsockShape   = shape{"vsock_id": {}, "guest_cid": {required: true}, "uds_path": {required: true}}
	entropyShape = shape{"rate_limiter": {inner: limiterShape}}
	balloonShape = shape{
		"amount_mib": {required: true}, "deflate_on_oom": {required: true}, "stats_polling_interval_s": {},
		"free_page_hinting": {since: 14}, "free_page_reporting": {since: 14},
	}
	actionShape = shape{"action_type": {required: true}}
)

// errJSON begins every message about a body that does not fit.
const errJSON = "An error occurred when deserializing the json body of a request: "

// decode reads a body into to, as strictly as serde does with deny_unknown_fields.
func (v *vmm) decode(body []byte, s shape, to any) error {
	if err := v.fits(body, body, s); err != nil {
		return wordsf(errJSON+"%v.", err)
	}
	if err := json.Unmarshal(body, to); err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) {
			return wordsf(errJSON+"invalid type: %s, expected %s at line 1 column %d.", wrong.Value, wrong.Type, wrong.Offset)
		}
		return wordsf(errJSON+"%v.", err)
	}
	return nil
}

// fits checks the fields of part, which is somewhere in body.
func (v *vmm) fits(body, part []byte, s shape) error {
	var have map[string]json.RawMessage
	if err := json.Unmarshal(part, &have); err != nil {
		return err
	}
	known := slices.Sorted(maps.Keys(s))
	known = slices.DeleteFunc(known, func(name string) bool { return !v.o.AtLeast(s[name].since) })
	for _, name := range slices.Sorted(maps.Keys(have)) {
		column := bytes.Index(body, []byte(`"`+name+`"`)) + len(name) + 2
		if !slices.Contains(known, name) {
			return fmt.Errorf("unknown field `%s`, expected one of `%s` at line 1 column %d", name, strings.Join(known, "`, `"), column)
		}
		if inner := s[name].inner; inner != nil && string(have[name]) != "null" {
			if err := v.fits(body, have[name], inner); err != nil {
				return err
			}
		}
	}
	for _, name := range known {
		if _, ok := have[name]; !ok && s[name].required {
			return fmt.Errorf("missing field `%s` at line 1 column %d", name, len(body))
		}
	}
	return nil
}

// oneOf checks a value of an enumeration that may be absent.
func oneOf(value string, allowed ...string) error {
	if value == "" || slices.Contains(allowed, value) {
		return nil
	}
	return wordsf(errJSON+"unknown variant `%s`, expected one of `%s`.", value, strings.Join(allowed, "`, `"))
}
