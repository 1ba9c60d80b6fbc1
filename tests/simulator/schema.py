# SPDX-License-Identifier: GPL-3.0-or-later
"""The classes of the XenAPI that the simulator knows, with every public field of a record.

One line of text per group of fields: ``name:type`` or ``name:type=default``.  Types: ``str``,
``int``, ``bool``, ``float``, ``date``, ``ref``, ``set`` (of strings), ``refs`` (set of references),
``map`` (string to string).  Order and names follow the generation of xapi 24 to 26.
"""

NULL = "OpaqueRef:NULL"
EPOCH = "19700101T00:00:00Z"

_FIELDS = {
    "session": """
        uuid:str this_host:ref this_user:ref last_active:date pool:bool other_config:map
        is_local_superuser:bool subject:ref validation_time:date auth_user_sid:str
        auth_user_name:str rbac_permissions:set tasks:refs parent:ref originator:str
        client_certificate:bool""",
    "task": """
        uuid:str name_label:str name_description:str allowed_operations:set current_operations:map
        created:date finished:date status:str=pending resident_on:ref progress:float
        type:str=<none/> result:str error_info:set other_config:map subtask_of:ref subtasks:refs
        backtrace:str=()""",
    "pool": """
        uuid:str name_label:str name_description:str master:ref default_SR:ref
        suspend_image_SR:ref crash_dump_SR:ref other_config:map ha_enabled:bool
        ha_configuration:map ha_statefiles:set ha_host_failures_to_tolerate:int
        ha_plan_exists_for:int ha_allow_overcommit:bool ha_overcommitted:bool blobs:map tags:set
        gui_config:map health_check_config:map wlb_url:str wlb_username:str wlb_enabled:bool
        wlb_verify_cert:bool redo_log_enabled:bool redo_log_vdi:ref vswitch_controller:str
        restrictions:map metadata_VDIs:refs ha_cluster_stack:str guest_agent_config:map
        cpu_info:map policy_no_vendor_device:bool live_patching_disabled:bool
        igmp_snooping_enabled:bool uefi_certificates:str custom_uefi_certificates:str
        is_psr_pending:bool tls_verification_enabled:bool repositories:refs
        client_certificate_auth_enabled:bool client_certificate_auth_name:str
        repository_proxy_url:str repository_proxy_username:str repository_proxy_password:ref
        migration_compression:bool coordinator_bias:bool=true local_auth_max_threads:int=8
        ext_auth_max_threads:int=1 ext_auth_cache_enabled:bool=true ext_auth_cache_size:int=50
        ext_auth_cache_expiry:int=300 telemetry_uuid:ref telemetry_frequency:str=weekly
        telemetry_next_collection:date last_update_sync:date update_sync_frequency:str=weekly
        update_sync_day:int update_sync_enabled:bool recommendations:map license_server:map
        ha_reboot_vm_on_internal_shutdown:bool=true""",
    "VM": """
        uuid:str allowed_operations:set current_operations:map name_label:str
        name_description:str power_state:str=Halted user_version:int=1 is_a_template:bool
        is_default_template:bool suspend_VDI:ref resident_on:ref scheduled_to_be_resident_on:ref
        affinity:ref memory_overhead:int=11534336 memory_target:int memory_static_max:int
        memory_dynamic_max:int memory_dynamic_min:int memory_static_min:int VCPUs_params:map
        VCPUs_max:int=1 VCPUs_at_startup:int=1 actions_after_softreboot:str=soft_reboot
        actions_after_shutdown:str=destroy actions_after_reboot:str=restart
        actions_after_crash:str=restart consoles:refs VIFs:refs VBDs:refs VUSBs:refs
        crash_dumps:refs VTPMs:refs PV_bootloader:str PV_kernel:str PV_ramdisk:str PV_args:str
        PV_bootloader_args:str PV_legacy_args:str HVM_boot_policy:str HVM_boot_params:map
        HVM_shadow_multiplier:float=1 platform:map PCI_bus:str other_config:map domid:int=-1
        domarch:str last_boot_CPU_flags:map is_control_domain:bool metrics:ref guest_metrics:ref
        last_booted_record:str recommendations:str xenstore_data:map ha_always_run:bool
        ha_restart_priority:str is_a_snapshot:bool snapshot_of:ref snapshots:refs
        snapshot_time:date transportable_snapshot_id:str blobs:map tags:set
        blocked_operations:map snapshot_info:map snapshot_metadata:str parent:ref children:refs
        bios_strings:map protection_policy:ref is_snapshot_from_vmpp:bool snapshot_schedule:ref
        is_vmss_snapshot:bool appliance:ref start_delay:int shutdown_delay:int order:int
        VGPUs:refs attached_PCIs:refs suspend_SR:ref version:int generation_id:str
        hardware_platform_version:int has_vendor_device:bool requires_reboot:bool
        reference_label:str domain_type:str=hvm NVRAM:map pending_guidances:set
        pending_guidances_recommended:set pending_guidances_full:set groups:refs""",
    "VM_metrics": """
        uuid:str memory_actual:int VCPUs_number:int VCPUs_utilisation:map VCPUs_CPU:map
        VCPUs_params:map VCPUs_flags:map state:set start_time:date install_time:date
        last_updated:date other_config:map hvm:bool nested_virt:bool nomigrate:bool
        current_domain_type:str=unspecified""",
    "VM_guest_metrics": """
        uuid:str os_version:map netbios_name:map PV_drivers_version:map
        PV_drivers_up_to_date:bool=true memory:map disks:map networks:map other:map
        last_updated:date other_config:map live:bool=true can_use_hotplug_vbd:str=unspecified
        can_use_hotplug_vif:str=unspecified PV_drivers_detected:bool=true services:map""",
    "host": """
        uuid:str name_label:str name_description:str memory_overhead:int=209715200
        allowed_operations:set current_operations:map API_version_major:int=2
        API_version_minor:int=21 API_version_vendor:str=XenSource
        API_version_vendor_implementation:map enabled:bool=true software_version:map
        other_config:map capabilities:set cpu_configuration:map sched_policy:str=credit
        supported_bootloaders:set resident_VMs:refs logging:map PIFs:refs suspend_image_sr:ref
        crash_dump_sr:ref crashdumps:refs patches:refs updates:refs PBDs:refs host_CPUs:refs
        cpu_info:map hostname:str address:str metrics:ref license_params:map boot_free_mem:int
        ha_statefiles:set ha_network_peers:set blobs:map tags:set external_auth_type:str
        external_auth_service_name:str external_auth_configuration:map edition:str=trial
        license_server:map bios_strings:map power_on_mode:str power_on_config:map
        local_cache_sr:ref chipset_info:map PCIs:refs PGPUs:refs PUSBs:refs ssl_legacy:bool
        guest_VCPUs_params:map display:str=enabled virtual_hardware_platform_versions:set
        control_domain:ref updates_requiring_reboot:refs features:refs iscsi_iqn:str
        multipathing:bool uefi_certificates:str certificates:refs editions:set
        pending_guidances:set tls_verification_enabled:bool last_software_update:date
        https_only:bool latest_synced_updates_applied:str=unknown
        numa_affinity_policy:str=default_policy pending_guidances_recommended:set
        pending_guidances_full:set last_update_hash:str""",
    "host_metrics": """
        uuid:str memory_total:int memory_free:int live:bool=true last_updated:date
        other_config:map""",
    "network": """
        uuid:str name_label:str name_description:str allowed_operations:set
        current_operations:map VIFs:refs PIFs:refs MTU:int=1500 other_config:map bridge:str
        managed:bool=true blobs:map tags:set default_locking_mode:str=unlocked assigned_ips:map
        purpose:set""",
    "PIF": """
        uuid:str device:str network:ref host:ref MAC:str MTU:int=1500 VLAN:int=-1 metrics:ref
        physical:bool=true currently_attached:bool=true ip_configuration_mode:str=DHCP IP:str
        netmask:str gateway:str DNS:str bond_slave_of:ref bond_master_of:refs VLAN_master_of:ref
        VLAN_slave_of:refs management:bool other_config:map disallow_unplug:bool
        tunnel_access_PIF_of:refs tunnel_transport_PIF_of:refs ipv6_configuration_mode:str=None
        IPv6:set ipv6_gateway:str primary_address_type:str=IPv4 managed:bool=true properties:map
        capabilities:set igmp_snooping_status:str=unknown sriov_physical_PIF_of:refs
        sriov_logical_PIF_of:refs PCI:ref""",
    "VIF": """
        uuid:str allowed_operations:set current_operations:map device:str network:ref VM:ref
        MAC:str MTU:int=1500 other_config:map currently_attached:bool status_code:int
        status_detail:str runtime_properties:map qos_algorithm_type:str qos_algorithm_params:map
        qos_supported_algorithms:set metrics:ref MAC_autogenerated:bool
        locking_mode:str=network_default ipv4_allowed:set ipv6_allowed:set
        ipv4_configuration_mode:str=None ipv4_addresses:set ipv4_gateway:str
        ipv6_configuration_mode:str=None ipv6_addresses:set ipv6_gateway:str""",
    "SR": """
        uuid:str name_label:str name_description:str allowed_operations:set
        current_operations:map VDIs:refs PBDs:refs virtual_allocation:int
        physical_utilisation:int physical_size:int=1099511627776 type:str=ext
        content_type:str=user shared:bool other_config:map tags:set sm_config:map blobs:map
        local_cache_enabled:bool introduced_by:ref clustered:bool is_tools_sr:bool""",
    "PBD": """
        uuid:str host:ref SR:ref device_config:map currently_attached:bool=true
        other_config:map""",
    "VDI": """
        uuid:str name_label:str name_description:str allowed_operations:set
        current_operations:map SR:ref VBDs:refs crash_dumps:refs virtual_size:int
        physical_utilisation:int type:str=user sharable:bool read_only:bool other_config:map
        storage_lock:bool location:str managed:bool=true missing:bool parent:ref
        xenstore_data:map sm_config:map is_a_snapshot:bool snapshot_of:ref snapshots:refs
        snapshot_time:date tags:set allow_caching:bool on_boot:str=persist metadata_of_pool:ref
        metadata_latest:bool is_tools_iso:bool cbt_enabled:bool""",
    "VBD": """
        uuid:str allowed_operations:set current_operations:map VM:ref VDI:ref device:str
        userdevice:str bootable:bool mode:str=RW type:str=Disk unpluggable:bool=true
        storage_lock:bool empty:bool other_config:map currently_attached:bool status_code:int
        status_detail:str runtime_properties:map qos_algorithm_type:str qos_algorithm_params:map
        qos_supported_algorithms:set metrics:ref""",
}

# Prefixes that are namespaces in the database, where they are followed by two underscores.
_NAMESPACES = {
    "VM": ("name", "memory", "VCPUs", "actions", "PV", "HVM"),
    "VM_metrics": ("memory", "VCPUs"),
    "host": ("name", "memory", "API_version"),
    "host_metrics": ("memory",),
    "VIF": ("qos",),
    "VBD": ("qos",),
    "task": ("name",),
    "network": ("name",),
    "SR": ("name",),
    "VDI": ("name",),
}

# (class, field holding a reference): (class, field with the set of references back)
RELATIONS = {
    ("VBD", "VM"): ("VM", "VBDs"),
    ("VBD", "VDI"): ("VDI", "VBDs"),
    ("VIF", "VM"): ("VM", "VIFs"),
    ("VIF", "network"): ("network", "VIFs"),
    ("PIF", "network"): ("network", "PIFs"),
    ("PIF", "host"): ("host", "PIFs"),
    ("VDI", "SR"): ("SR", "VDIs"),
    ("VDI", "snapshot_of"): ("VDI", "snapshots"),
    ("PBD", "SR"): ("SR", "PBDs"),
    ("PBD", "host"): ("host", "PBDs"),
    ("VM", "snapshot_of"): ("VM", "snapshots"),
    ("VM", "parent"): ("VM", "children"),
    ("VM", "resident_on"): ("host", "resident_VMs"),
}

_ZERO = {
    "str": "", "int": 0, "bool": False, "float": 0.0, "date": EPOCH, "ref": NULL,
    "set": [], "refs": [], "map": {},
}


def _parse_default(kind, text):
    if kind == "bool":
        return text == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text)
    return text


def _read(text):
    types, defaults = {}, {}
    for word in text.split():
        name, _, kind = word.partition(":")
        kind, given, default = kind.partition("=")
        types[name] = kind
        defaults[name] = _parse_default(kind, default) if given else _ZERO[kind]
    return types, defaults


TYPES = {}
DEFAULTS = {}
for _cls, _text in _FIELDS.items():
    TYPES[_cls], DEFAULTS[_cls] = _read(_text)
_MUTABLE = {
    cls: [(name, type(value)) for name, value in defaults.items()
          if isinstance(value, (list, dict))]
    for cls, defaults in DEFAULTS.items()
}


def new_record(cls, **fields):
    """A complete record of the class, with the given fields."""
    record = DEFAULTS[cls].copy()
    for name, make in _MUTABLE[cls]:
        record[name] = make()
    for name, value in fields.items():
        if name not in record:
            raise KeyError("%s has no field %s" % (cls, name))
        record[name] = value
    return record


def db_name(cls, field):
    """The name that the database gives to a field of the API (name_label: name__label)."""
    for prefix in _NAMESPACES.get(cls, ()):
        if field.startswith(prefix + "_"):
            return prefix + "__" + field[len(prefix) + 1:]
    return field


DB_NAMES = {cls: {db_name(cls, field): field for field in types} for cls, types in TYPES.items()}


def _quote(text):
    return "'%s'" % text.replace("\\", "\\\\").replace("'", "\\'")


def to_db(kind, value):
    """A field's value as the text that the database holds."""
    if kind == "bool":
        return "true" if value else "false"
    if kind == "float":
        return "%.16g" % value
    if kind in ("set", "refs"):
        return "(%s)" % " ".join(_quote(str(item)) for item in value)
    if kind == "map":
        return "(%s)" % " ".join(
            "(%s %s)" % (_quote(key), _quote(str(item))) for key, item in value.items())
    return str(value)


def from_db(kind, text):
    """The value of a field, from the text that the database holds."""
    if kind in ("set", "refs"):
        return _read_sexpr(text)
    if kind == "map":
        return dict(pair for pair in _read_sexpr(text) if len(pair) == 2)
    if kind == "bool":
        return text == "true"
    if kind in ("int", "float"):
        return {"int": int, "float": float}[kind](text or 0)
    return text


def _read_sexpr(text):
    """The items of a list such as ``('a' 'b')`` or ``(('k' 'v'))``."""
    stack = [[]]
    position = 0
    while position < len(text):
        character = text[position]
        position += 1
        if character == "(":
            stack.append([])
        elif character == ")":
            done = stack.pop()
            stack[-1].append(done)
        elif character == "'":
            word = []
            while text[position] != "'":
                if text[position] == "\\":
                    position += 1
                word.append(text[position])
                position += 1
            position += 1
            stack[-1].append("".join(word))
    return stack[0][0] if stack[0] else []
