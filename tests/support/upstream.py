# SPDX-License-Identifier: GPL-3.0-or-later
"""What VmBackup 3.25 leaves on disk: folders, markers, dumps, a password file."""
import base64

MARKERS = ("success", "success_restore", "success_compress", "success_compressing")


def folder_name(day, month=8):
    return "backup-2019-%02d-%02d-(02:00:00)" % (month, day)


def leave_backup(backups, vm, day, marker="success", suffix="xva"):
    """A folder as 3.25 makes it, metadata included; marker None: its export failed half way."""
    folder = backups / vm / folder_name(day)
    for inside in ("DISK-xvda", "VIFs"):
        (folder / inside).mkdir(parents=True)
    files = {
        "%s.%s" % (vm, suffix): "the export of day %d" % day,
        "vm-metadata.xml": '<?xml version="1.0"?>\n<value/>\n',
        "DISK-xvda/vbd.cfg": "userdevice=0\nbootable=True\nmode=RW\ntype=Disk\nunpluggable=True\n"
                             "empty=False\norig_uuid=8d1bd05c-0000-0000-0000-000000000001\n",
        "DISK-xvda/vdi.cfg": "name_label=root\nname_description=\nvirtual_size=1048576\ntype=user\n"
                             "sharable=False\nread_only=False\n"
                             "orig_uuid=8d1bd05c-0000-0000-0000-000000000002\n"
                             "orig_sr_uuid=8d1bd05c-0000-0000-0000-000000000003\n",
        "VIFs/vif-0.cfg": "device=0\nnetwork_name_label=LAN\nMTU=1500\nMAC=0a:00:00:00:00:01\n"
                          "other_config={}\norig_uuid=8d1bd05c-0000-0000-0000-000000000004\n",
    }
    if marker:
        files[marker] = ""
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def leave_pool_dump(backups, server, stamp):
    folder = backups / ("METADATA_" + server)
    folder.mkdir(exist_ok=True)
    path = folder / ("pool_db_%s.dump" % stamp)
    path.write_text("<database></database>")
    return path


def leave_password_file(path, password):
    """As create-password-file of 3.25 does: world readable, base64 without a line break."""
    path.write_bytes(base64.b64encode(password.encode("utf-8")))
    path.chmod(0o644)
    return path
